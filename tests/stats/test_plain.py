"""The reference in float64, its chunks, and the heads it makes logits from.

What it shares with the kernels (hard rows, masks, strides, in float32) is tested in kernels/test_token_stats.py.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from truth import FIELDS, assert_as_accurate_as_plain_pytorch, plain_pytorch

from dentropy.stats import plain

TRANSFORMS = [{}, dict(temperature=0.6), dict(softcap=3.0), dict(softcap=3.0, temperature=1.7)]


def draw(rows=6, vocabulary=300, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits, dlogits, d2logits = torch.randn(3, rows, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return (2 * logits).to(dtype), targets, dlogits.to(dtype), d2logits.to(dtype)


def assert_all_close(stats, truth, rtol, names=FIELDS):
    for name in names:
        want = truth[name]
        torch.testing.assert_close(
            getattr(stats, name).double(),
            want.double(),
            rtol=rtol,
            atol=rtol * want.abs().max().item(),
            msg=lambda text: f"{name}: {text}",
        )


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_all_six_against_nested_forward_mode(transform):
    inputs = draw()
    stats = plain.token_stats(*inputs, **transform)
    assert all(field.dtype == torch.float64 for field in stats)
    assert_all_close(stats, plain_pytorch(*inputs, **transform), rtol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_all_six_against_finite_differences_of_the_two_values(transform):
    logits, targets, dlogits, d2logits = draw()
    step = 1e-4

    def at(eta):
        stats = plain.token_stats(logits + eta * dlogits + eta**2 / 2 * d2logits, targets, **transform)
        return {"logp": stats.logp, "entropy": stats.entropy}

    low, here, high = at(-step), at(0.0), at(step)
    stats = plain.token_stats(logits, targets, dlogits, d2logits, **transform)
    assert_all_close(stats, here, rtol=1e-14, names=("logp", "entropy"))
    first = {f"d{name}": (high[name] - low[name]) / (2 * step) for name in here}
    assert_all_close(stats, first, rtol=1e-6, names=("dlogp", "dentropy"))
    second = {f"d2{name}": (high[name] - 2 * here[name] + low[name]) / step**2 for name in here}
    assert_all_close(stats, second, rtol=1e-6, names=("d2logp", "d2entropy"))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_rows_in_float32(dtype, transform):
    inputs = draw(vocabulary=5000, dtype=dtype)
    assert_as_accurate_as_plain_pytorch(plain.token_stats(*inputs, **transform), *inputs, **transform)


def test_a_row_that_is_not_finite_hides_no_mask_in_its_chunk():
    logits, targets, *tangents = draw()
    logits[:, 1::2] = -math.inf
    logits[0, 0] = math.nan
    stats = plain.token_stats(logits, targets // 2 * 2, *tangents)
    assert all(field[0].isnan() and field[1:].isfinite().all() for field in stats)


@pytest.mark.parametrize("chunk_rows", [1, 4, 6, 100])
def test_chunks_change_nothing(chunk_rows, monkeypatch):
    inputs = draw()
    truth = plain_pytorch(*inputs)
    monkeypatch.setattr(plain, "CPU_CHUNK", chunk_rows * 300)
    assert_all_close(plain.token_stats(*inputs), truth, rtol=1e-12)


def test_no_rows():
    logits, targets, dlogits, d2logits = draw(rows=0)
    assert all(field.shape == (0,) for field in plain.token_stats(logits, targets, dlogits, d2logits))


def head(dtype=torch.float64, rows=9, width=16, vocabulary=77):
    """hidden, weight, bias, their tangents by the names of the arguments, and targets."""
    generator = torch.Generator().manual_seed(1)
    shapes = dict(hidden=(rows, width), weight=(vocabulary, width), bias=(vocabulary,))
    made = {
        prefix + name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
        for prefix in ("", "d")
    }
    return made | dict(targets=torch.randint(vocabulary, (rows,), generator=generator))


def head_truth(inputs, **transform):
    """Through torch.func.jvp of the head itself, in float64 from the same rounded inputs."""
    names = [name for name in ("hidden", "weight", "bias") if inputs.get(name) is not None]
    primals = [inputs[name].double() for name in names]
    tangents = [
        torch.zeros_like(primal) if inputs.get(f"d{name}") is None else inputs[f"d{name}"].double()
        for name, primal in zip(names, primals)
    ]

    def logits(*factors):
        return torch.nn.functional.linear(*factors)

    z, dz = torch.func.jvp(logits, tuple(primals), tuple(tangents))
    return plain_pytorch(z, inputs["targets"], dz, **transform)


MOVING = [("dhidden",), ("dweight",), ("dbias",), ("dhidden", "dweight"), ("dhidden", "dweight", "dbias")]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("moving", MOVING, ids="+".join)
def test_heads(moving, transform):
    inputs = head()
    inputs |= {name: None for name in ("dhidden", "dweight", "dbias") if name not in moving}
    stats = plain.linear_token_stats(**inputs, **transform)
    assert_all_close(stats, head_truth(inputs, **transform), rtol=1e-12, names=FIELDS[:4])
    assert stats.d2logp is None


def test_head_without_bias_and_head_that_stands_still():
    inputs = head() | dict(bias=None, dbias=None)
    assert_all_close(plain.linear_token_stats(**inputs), head_truth(inputs), rtol=1e-12, names=FIELDS[:4])
    still = plain.linear_token_stats(inputs["hidden"], inputs["weight"], inputs["targets"])
    assert_all_close(still, head_truth(inputs), rtol=1e-12, names=FIELDS[:2])
    assert still[2:] == (None,) * 4
    assert plain.linear_token_stats(**head(rows=0)).dentropy.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_heads_never_round_their_logits(dtype):
    """Rounding the logits to half precision costs 1e-3 to 1e-2 here."""
    inputs = head(dtype, width=64, vocabulary=500)
    stats = plain.linear_token_stats(**inputs, temperature=4.0)
    assert stats.logp.dtype == torch.float32
    assert_all_close(stats, head_truth(inputs, temperature=4.0), rtol=1e-5, names=FIELDS[:4])


def test_products_that_come_out_in_float32_are_taken_in_blocks(monkeypatch):
    """The way of half precision on CUDA, with torch.mm and its out_dtype played by float64 on the CPU."""

    def product(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16 and b.shape[1] <= 10
        return (a.double() @ b.double()).to(out_dtype)

    monkeypatch.setattr(plain, "_products_in_float32", lambda *factors: True)
    monkeypatch.setattr(plain, "PRODUCT_BLOCK", 10)
    monkeypatch.setattr(torch, "mm", product)
    inputs = head(torch.bfloat16)
    assert_all_close(plain.linear_token_stats(**inputs), head_truth(inputs), rtol=1e-5, names=FIELDS[:4])


def test_dtypes_of_a_head_may_differ():
    inputs = head(torch.bfloat16)
    inputs |= {name: inputs[name].float() for name in ("dhidden", "dweight", "bias", "dbias")}
    assert_all_close(plain.linear_token_stats(**inputs), head_truth(inputs), rtol=1e-5, names=FIELDS[:4])


def test_logits_of_all_rows_never_exist(monkeypatch):
    """With chunks of 2 rows the largest tensor is a chunk's buffer: logits, tangents, as much scratch."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            Largest.elements = max(Largest.elements, *sizes, 0)
            return out

    inputs = head(rows=50, width=4)
    monkeypatch.setattr(plain, "LOGITS_CHUNK", 2 * 77)
    with Largest():
        stats = plain.linear_token_stats(**inputs)
    assert 0 < Largest.elements <= 4 * (2 * 77) < 50 * 77
    assert_all_close(stats, head_truth(inputs), rtol=1e-12, names=FIELDS[:4])
