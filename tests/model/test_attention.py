import ctypes
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from dentropy.model import attention, attention_ops


def closed_form(q, k, v, *, scaling, window=None, softcap=None, sinks=None):
    """One sequence, one head at a time, a Python loop over queries: [H, T, D] x [Hkv, T, D] -> [T, H, D]."""
    heads, length, _ = q.shape
    rows = []
    for t in range(length):
        low = 0 if window is None else max(0, t - window + 1)
        row = []
        for h in range(heads):
            g = h * k.shape[0] // heads
            s = (k[g, low : t + 1] @ q[h, t]) * scaling
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            z = s if sinks is None else torch.cat([s, sinks[h : h + 1]])
            p = (z - torch.logsumexp(z, 0)).exp()[: len(s)]
            row.append(p @ v[g, low : t + 1])
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(window=3),
        dict(window=20),
        dict(softcap=2.0),
        dict(sinks=True),
        dict(window=5, softcap=2.0, sinks=True),
    ],
    ids=str,
)
def test_packed_output_and_tangent_equal_the_closed_form(settings, block, monkeypatch):
    monkeypatch.setattr(attention_ops, "QUERY_BLOCK", block)
    monkeypatch.setattr(attention_ops, "TOGETHER", block)
    torch.manual_seed(0)
    lengths, heads, kv_heads, size = [1, 11, 6], 4, 2, 8
    total = sum(lengths)
    q, dq = torch.randn(2, 1, heads, total, size, dtype=torch.float64)
    (k, dk), (v, dv) = torch.randn(2, 2, 1, kv_heads, total, size, dtype=torch.float64)
    sinks, dsinks = torch.randn(2, heads, dtype=torch.float64) if settings.get("sinks") else (None, None)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    options = {name: settings.get(name) for name in ("window", "softcap")}

    def expected(q, k, v, sinks=None):
        return torch.cat(
            [
                closed_form(q[0, :, a:b], k[0, :, a:b], v[0, :, a:b], scaling=0.3, sinks=sinks, **options)
                for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
            ]
        )[None]

    primals, tangents = ((q, k, v), (dq, dk, dv)) if sinks is None else ((q, k, v, sinks), (dq, dk, dv, dsinks))
    out, dout = torch.func.jvp(expected, primals, tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
        got, weights = attention.attention_forward(
            None,
            *duals[:3],
            None,
            scaling=0.3,
            sliding_window=options["window"],
            softcap=options["softcap"],
            s_aux=duals[3] if sinks is not None else None,
            cu_seq_lens_q=bounds,
            dropout=0.0,
            position_ids=None,
        )
        got, dgot = forward_ad.unpack_dual(got)
    assert weights is None
    torch.testing.assert_close(got, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dgot, dout, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [8, 64])
def test_values_have_the_same_bits_with_tangents_and_without(size):
    """A measured change is the difference of a pass with tangents and one without."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 8, 300, size), torch.randn(2, 1, 2, 300, size)
    settings = dict(scaling=0.3, cu_seq_lens_q=torch.tensor([0, 100, 300], dtype=torch.int32))
    plain, _ = attention.attention_forward(None, q, k, v, None, **settings)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, torch.randn_like(x)) for x in (q, k, v))
        moving, _ = attention.attention_forward(None, *duals, None, **settings)
        assert torch.equal(forward_ad.unpack_dual(moving).primal, plain)


@pytest.mark.parametrize("moving", ["query", "key", "value"])
def test_a_tangent_on_one_input_alone_is_enough(moving):
    torch.manual_seed(0)
    inputs = dict(query=torch.randn(1, 2, 5, 4), key=torch.randn(1, 1, 5, 4), value=torch.randn(1, 1, 5, 4))
    tangent = torch.randn_like(inputs[moving])

    def run(x):
        return attention.attention_forward(None, **(inputs | {moving: x}))[0]

    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(run(forward_ad.make_dual(inputs[moving], tangent))).tangent
    inputs = {name: x.double() for name, x in inputs.items()}
    step = 1e-6
    ahead, behind = (run(inputs[moving] + sign * step * tangent.double()) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]], ids=str)
def test_no_tokens_give_no_output(bounds):
    q, k, v = (torch.randn(0, *shape) for shape in ((4, 8), (2, 8), (2, 6)))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    out, dout = attention_ops.attention_with_tangent((q, k, v), (q, None, v), cu_seqlens, 0, scaling=0.3)
    assert out.shape == dout.shape == (0, 4, 6)
    assert attention_ops.attention(q, k, v, cu_seqlens, 0, 0.3)[0].shape == (0, 4, 6)


def test_without_tangents_it_is_plain_and_differentiable():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, _ = attention.attention_forward(None, q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_half_precision_is_as_accurate_as_pytorch_in_that_dtype():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 33, 16, dtype=torch.bfloat16) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True)
    peer = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    got = attention.attention_forward(None, q, k, v)[0].transpose(1, 2)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= 1.5 * (peer.double() - exact).abs().max()


@pytest.fixture
def packed():
    """q, k, v, their tangents and cu_seqlens of two packed sequences."""
    torch.manual_seed(0)
    (q, dq), (k, dk), (v, dv) = (torch.randn(2, 9, heads, 8).unbind() for heads in (4, 2, 2))
    return (q, k, v), (dq.clone(), dk.clone(), dv.clone()), torch.tensor([0, 5, 9], dtype=torch.int32)


SINKS = dict(window=3, softcap=2.0, sinks=torch.linspace(-1, 1, 4))


@pytest.mark.parametrize("settings", [{}, SINKS], ids=["plain", "window, softcap and sinks"])
def test_the_operators_keep_pytorchs_rules(packed, settings):
    primals, (dq, _, dv), cu_seqlens = packed
    out, lse = attention_ops.attention(*primals, cu_seqlens, 5, 0.3, **settings)
    torch.library.opcheck(attention_ops.attention, (*primals, cu_seqlens, 5, 0.3), settings)
    torch.library.opcheck(
        attention_ops.attention_tangent, (*primals, dq, None, dv, out, lse, cu_seqlens, 0.3), settings
    )


def test_the_adjoint_is_never_run(packed):
    primals, _, cu_seqlens = packed
    inputs = [x.requires_grad_() for x in primals]
    out, _ = attention_ops.attention(*inputs, cu_seqlens, 5, 0.3)
    with pytest.raises(NotImplementedError, match="with gradients use plain_attention"):
        out.sum().backward()


def test_key_heads_that_do_not_divide_the_queries_are_refused():
    with pytest.raises(ValueError, match="key: 2 heads, expected a number that divides the query's 3"):
        attention.attention_forward(None, *(torch.randn(1, heads, 5, 4) for heads in (3, 2, 2)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_linear_in_the_length_with_an_allocator_that_keeps_gaps(monkeypatch):
    """All scores at once are 61 MiB, those of a block 0.5; walked from the first block on, glibc came to hold 61.

    At 24,000 tokens, 2 heads of size 64, the peak is 180 MiB above the inputs, 23 of them results, most of the rest
    copies of the inputs; it was 2 GB. All scores at once are 4.6 GB.
    """
    monkeypatch.setattr(attention_ops, "QUERY_BLOCK", 32)
    length = 4000
    x, cu_seqlens = torch.randn(length, 1, 4), torch.tensor([0, length], dtype=torch.int32)

    def resident(field):  # MiB
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, so that using it again counts
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident("VmRSS")
    attention_ops.plain_attention((x, x, x), (x, x, x), cu_seqlens, scaling=0.25)
    assert resident("VmHWM") - before < 30
