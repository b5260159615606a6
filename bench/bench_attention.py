"""Packed causal attention, forward and tangent: dentropy, PyTorch's forward mode, and jvp_flash_attention.

    pytest bench/bench_attention.py --benchmark-json=run.json && python bench/report.py run.json

With a GPU: bfloat16, 8192 tokens in sequences of 1024, 4096 and 8192, and float32 in sequences of 4096, 16 heads of
size 128 on 4 key heads; on a CPU float32 and smaller. The forward has 4·D operations for each head and each pair of a
query and a key that it sees, the tangent 2.5 times as many. The rate stands beside that of one large product of
matrices in the same dtype and rounds. How providers are timed and checked: see `interleaved`.
"""

import pytest
import torch
from interleaved import Provider, compare, largest_error, name_of
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dentropy.model import attention_ops

# device, dtype, sequences, their length, heads, key heads, head size
CASES = (
    ("cpu", torch.float32, 2, 512, 8, 2, 64),
    ("cpu", torch.float32, 1, 1024, 8, 2, 64),
    ("cuda", torch.bfloat16, 8, 1024, 16, 4, 128),
    ("cuda", torch.bfloat16, 2, 4096, 16, 4, 128),
    ("cuda", torch.bfloat16, 1, 8192, 16, 4, 128),
    ("cuda", torch.float32, 2, 4096, 16, 4, 128),
)
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 4e-2}
PRODUCT = {"cpu": 512, "cuda": 8192}  # rows and columns of the product that rates stand beside
CHECKED = 64  # queries, the first and the last of the last sequence, that are held against float64


class Inputs:
    """Primals and tangents of `sequences` sequences of one length, packed: [tokens, heads, size]."""

    def __init__(self, device, dtype, sequences, length, heads, kv_heads, size):
        torch.manual_seed(0)
        self.sequences, self.length, self.scaling = sequences, length, size**-0.5
        self.primals, self.tangents = zip(
            *(
                torch.randn(2, sequences * length, n, size, dtype=dtype, device=device).unbind()
                for n in (heads, kv_heads, kv_heads)
            )
        )
        self.cu_seqlens = torch.arange(0, sequences * length + 1, length, dtype=torch.int32, device=device)
        self.forward_operations = 2 * length * (length + 1) * sequences * heads * size

    def by_sequence(self, tensors):
        """[sequences, H, length, size], key heads repeated: what the other providers take."""
        q, k, v = (x.unflatten(0, (self.sequences, self.length)).transpose(1, 2) for x in tensors)
        groups = q.shape[1] // k.shape[1]
        return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def packed(x):
    return x.transpose(1, 2).flatten(0, 1)


def dentropy(x):
    return attention_ops.attention_with_tangent(x.primals, x.tangents, x.cu_seqlens, x.length, scaling=x.scaling)


def dentropy_forward(x):
    return attention_ops.attention(*x.primals, x.cu_seqlens, x.length, x.scaling)[:1]


def dentropy_tangent(x):
    """A function that computes the tangent alone; the forward is done here."""
    from dentropy.kernels.attention import attention
    from dentropy.kernels.attention_tangent import attention_tangent

    out, lse = attention(*x.primals, x.cu_seqlens, x.length, scaling=x.scaling)
    return lambda x: (out, attention_tangent(*x.primals, *x.tangents, out, lse, x.cu_seqlens, scaling=x.scaling))


def product_of(size, x):
    """A function that multiplies two square matrices of that size and of the dtype of the inputs."""
    a, b = torch.randn(2, size, size, device=x.cu_seqlens.device).to(x.primals[0].dtype)
    out = torch.empty_like(a)
    return lambda x: torch.mm(a, b.T, out=out)


def jvp_of(function, x):
    out, dout = torch.func.jvp(function, x.by_sequence(x.primals), x.by_sequence(x.tangents))
    return packed(out), packed(dout)


def sdpa_math(x):
    with sdpa_kernel(SDPBackend.MATH):
        return jvp_of(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), x)


def eager(x):
    return jvp_of(lambda q, k, v: masked_softmax(q, k, v, torch.arange(x.length, device=q.device)), x)


def masked_softmax(q, k, v, rows):
    """Attention as models write it down, for queries q that stand at `rows` of their sequence."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    s = s.masked_fill(rows[:, None] < torch.arange(k.shape[-2], device=q.device), -torch.inf)
    return torch.softmax(s, -1, dtype=torch.promote_types(s.dtype, torch.float32)).to(q.dtype) @ v


def jvp_flash_attention(x):
    from jvp_flash_attention.jvp_attention import JVPAttn

    with forward_ad.dual_level():
        pairs = zip(x.by_sequence(x.primals), x.by_sequence(x.tangents))
        duals = [forward_ad.make_dual(primal.contiguous(), tangent.contiguous()) for primal, tangent in pairs]
        out, dout = forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals, causal=True))
    return packed(out), packed(dout)


def truth_of(x):
    """The checked rows of the packed output and tangent, and what they are in float64."""
    rows = torch.cat([torch.arange(CHECKED), torch.arange(x.length - CHECKED, x.length)])
    rows = rows.to(x.cu_seqlens.device)
    pairs = []
    for tensors in (x.primals, x.tangents):
        q, k, v = (tensor[-1:].double() for tensor in x.by_sequence(tensors))
        pairs.append((q[:, :, rows], k, v))
    truth = torch.func.jvp(lambda q, k, v: masked_softmax(q, k, v, rows), *pairs)
    return (x.sequences - 1) * x.length + rows, [packed(part) for part in truth]


@pytest.mark.parametrize("device, dtype, sequences, length, heads, kv_heads, size", CASES)
def test_attention(benchmark, device, dtype, sequences, length, heads, kv_heads, size):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = Inputs(device, dtype, sequences, length, heads, kv_heads, size)
    tolerance, forward, rows_of_product = TOLERANCE[dtype], x.forward_operations, min(PRODUCT[device], 2 * length)
    providers = {
        "dentropy": Provider(dentropy, tolerance),
        "dentropy, forward alone": Provider(dentropy_forward, tolerance, work=forward),
        "torch.func.jvp, SDPA math": Provider(sdpa_math, tolerance),
        "torch.func.jvp, eager attention": Provider(eager, tolerance),
        "jvp_flash_attention": Provider(jvp_flash_attention, tolerance, "jvp_flash_attention", cuda=True),
        "a large product": Provider(product_of(rows_of_product, x), work=2 * rows_of_product**3),
    }
    if device == "cuda":
        providers["dentropy, tangent alone"] = Provider(dentropy_tangent(x), tolerance, work=2.5 * forward)
    rows, truth = truth_of(x)
    compare(
        benchmark,
        f"Causal attention, forward and tangent, {sequences} x {length} tokens, heads {heads}/"
        f"{kv_heads} of {size}, {name_of(dtype, device)}",
        providers,
        (x,),
        lambda output: largest_error([part[rows] for part in output], truth),
        device=device,
        work=3.5 * forward,
        unit="TFLOP/s",
        reference="a large product",
        headline=length == 4096 and dtype == torch.bfloat16,
    )
