"""Three products of TF32 parts in place of a float32 one: what they cost in accuracy, emulated.

The interpreter multiplies in full float32. A tensor core rounds factors to TF32 (11 bits), adds 8 products exactly and
their sum to the accumulator, and truncates it to float32: measured on NVIDIA's V100 and A100 by Fasi, Higham, Mikaitis
and Pranesh (Numerical behavior of NVIDIA tensor cores, 2021); of later ones it is an assumption.
"""

import math

import pytest
import torch
from truth import plain_pytorch, scales

UNIT = torch.finfo(torch.float32).eps


def tf32(x):
    """The nearest number with 11 significant bits; of two, the larger."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(x):
    """float64 to float32, towards zero."""
    rounded = x.float()
    return torch.where(rounded.double().abs() > x.abs(), torch.nextafter(rounded, torch.zeros(())), rounded)


def on_tensor_cores(acc, a, b):
    for k in range(0, a.shape[1], 8):
        acc = truncated(acc.double() + a[:, k : k + 8].double() @ b[:, k : k + 8].double().T)
    return acc


def three_products(a, b, depth, apart):
    """a · bᵀ in steps of `depth`, whose sums are added apart from the tensor cores, as `dot_apart` does, or in them."""
    high = [tf32(x) for x in (a, b)]
    low = [tf32(x - h) for x, h in zip((a, b), high)]
    out = torch.zeros(len(a), len(b))
    for k in range(0, a.shape[1], depth):
        step = torch.zeros_like(out) if apart else out
        for x, y in ((low[0], high[1]), (high[0], low[1]), (high[0], high[1])):
            step = on_tensor_cores(step, x[:, k : k + depth], y[:, k : k + depth])
        out = out + step if apart else step
    return out


def excess(product, depth):
    """Of the head's statistics: the largest error over what the head's tests allow, from logits made by `product`."""
    generator = torch.Generator().manual_seed(0)
    hidden, dhidden, weight = (torch.randn(n, depth, generator=generator) for n in (8, 8, 503))
    weight *= 2 / math.sqrt(depth)
    targets = torch.randint(503, (8,), generator=generator)
    logits, dlogits = (product(x, weight) for x in (hidden, dhidden))
    exact = [x.double() @ weight.double().T for x in (hidden, dhidden)]
    plain = plain_pytorch(hidden @ weight.T, targets, dhidden @ weight.T, dtype=torch.float32)
    got = plain_pytorch(logits, targets, dlogits, dtype=torch.float32)
    truth = plain_pytorch(exact[0], targets, exact[1])
    scale = scales(truth, *exact)
    return max(
        (
            (got[name].double() - want).abs().max()
            / (2 * (plain[name].double() - want).abs().max() + 4 * UNIT * scale[name].max())
        ).item()
        for name, want in truth.items()
    )


@pytest.mark.parametrize("depth", [128, 1024, 4096])
@pytest.mark.parametrize("step", [16, 32])
def test_three_products_are_as_accurate_as_plain_float32_where_steps_are_summed_apart(depth, step):
    assert excess(lambda a, b: three_products(a, b, step, apart=True), depth) <= 1


def test_without_that_truncation_costs_ten_times_the_error():
    """Why attention, whose products are one step each of the whole head size and of all keys, stays in full float32."""
    assert excess(lambda a, b: three_products(a, b, 32, apart=False), 1024) > 10
    assert excess(lambda a, b: tf32(a) @ tf32(b).T, 1024) > 100  # one product of TF32 factors
