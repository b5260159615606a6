"""The tangent of packed causal attention, in one pass over the keys.

With p = exp(s − lse) from the primal's log-sum-exp and a dot for the derivative,

    ṡ_ij = scaling · (q̇_i · k_j + q_i · k̇_j)   (times 1 − tanh²(s / softcap) with a softcap),
    ȯ_i = Σ_j p_ij (ṡ_ij − m_i) v_j + Σ_j p_ij v̇_j,     m_i = Σ_j p_ij ṡ_ij + p_sink ṡ_sink,

which is Σ_j p ṡ v + Σ_j p v̇ − m o: five products of matrices, and no maximum to follow. What precision that
needs: in half precision the factors of a product are rounded, and so is o. A part common to all ṡ_ij of a
query (keys with a bias make one) adds nothing to ȯ, but would leave errors of its size in p ṡ and m o.
Hence ṡ is taken relative to a reference r_i, its mean over the first block of keys that the query meets, and

    x = round(p (ṡ − r)),     ȯ = Σ x v + Σ p v̇ − (Σ x + p_sink (ṡ_sink − r)) o,

where the very x that multiply v are summed: a part common to all v then cancels but for the rounding of o,
whose factor is now of the size of what tells the keys apart. All sums are float32, and for float32 inputs
nothing is rounded on the way.
float16 holds x between 6e-8 and 65504 only; bfloat16 has no such limit.
"""

import torch
import triton
import triton.language as tl

from .configurations import ATTENTION_TANGENT, attention_blocks, options
from .moments import BITS
from .packing import grid, key_blocks, last_contiguous, load_tile, query_block, seen, sizes, store_tile, strided
from .products import dot, rounded
from .softcap import softcapped


@triton.jit
def _scores(
    query, source, form, n, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr
):
    """p and ṡ for keys n, ..., n + BLOCK_N − 1; a key that is not seen has p = 0."""
    q, dq, DQ, lse, queries = query
    K, DK, V, DV, head, start, length = source
    scaling, softcap, window = form
    k = load_tile(K, head, start, n, length, BLOCK_N, SIZE, PADDED, MASKED)
    zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    s = dot(q, k.T, zeros, "ieee")
    ds = zeros
    if DQ is not None:
        ds = dot(dq, k.T, ds, "ieee")
    if DK is not None:
        dk = load_tile(DK, head, start, n, length, BLOCK_N, SIZE, PADDED, MASKED)
        ds = dot(q, dk.T, ds, "ieee")
    if softcap is not None:
        s, ds, _ = softcapped(s, ds, ds, scaling / softcap)
        unit = softcap
    else:
        unit = scaling
    # s has the digits of a sum of products, and here loses none: its difference to lse is rounded once.
    p = tl.exp2(tl.fma(s, unit * BITS, -lse[:, None]))
    ds *= unit
    if MASKED:
        p = tl.where(seen(queries, n + tl.arange(0, BLOCK_N), window), p, 0.0)
    return p, ds


@triton.jit
def _add(
    state,
    p,
    ds,
    reference,
    source,
    n,
    MOVES: tl.constexpr,
    SIZE_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Σ x v + Σ p v̇ and Σ x with one block of keys more."""
    acc, factor = state
    K, DK, V, DV, head, start, length = source
    if DV is not None:  # first: this product runs while x is made
        dv = load_tile(DV, head, start, n, length, BLOCK_N, SIZE_V, PADDED_V, MASKED)
        acc = dot(p.to(dv.dtype), dv, acc, "ieee")
    if MOVES:
        v = load_tile(V, head, start, n, length, BLOCK_N, SIZE_V, PADDED_V, MASKED)
        x, rounded_x = rounded(p * (ds - reference[:, None]), v.dtype)
        factor += tl.sum(rounded_x, 1)
        acc = dot(x, v, acc, "ieee")
    return acc, factor


@triton.jit
def _walk(
    state,
    query,
    reference,
    source,
    form,
    low,
    high,
    MOVES: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    for n in range(low, high, BLOCK_N):
        p, ds = _scores(query, source, form, n, SIZE, PADDED, BLOCK_N, MASKED)
        state = _add(state, p, ds, reference, source, n, MOVES, SIZE_V, PADDED_V, BLOCK_N, MASKED)
    return state


@triton.jit(do_not_specialize=["S", "tokens", "window"])
def _attention_tangent_kernel(
    Q,
    K,
    V,
    O,  # (pointer, row stride, head stride) of [tokens, H or Hkv, D or Dv]
    DQ,
    DK,
    DV,  # the same for their tangents, or None
    Out,  # the same for ȯ
    Lse,  # [H, tokens] float32
    Sinks,
    DSinks,  # [H], or None
    CuSeqlens,  # [S + 1]
    S,
    tokens,
    H,
    Hkv,
    scaling,
    softcap,
    window,  # softcap, window: numbers or None
    SIZE: tl.constexpr,
    SIZE_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    MOVES: tl.constexpr = DQ is not None or DK is not None  # whether any ṡ of a key is not 0
    head, start, length, first = query_block(CuSeqlens, S, H, BLOCK_M)
    if first < length:
        low, whole, end = key_blocks(first, length, window, BLOCK_M, BLOCK_N)
        queries = first + tl.arange(0, BLOCK_M)
        q = load_tile(Q, head, start, first, length, BLOCK_M, SIZE, PADDED, True)
        dq = q  # not used where DQ is None
        if DQ is not None:
            dq = load_tile(DQ, head, start, first, length, BLOCK_M, SIZE, PADDED, True)
        place = Lse + head.to(tl.int64) * tokens + start + queries
        lse = tl.load(place, mask=queries < length, other=0.0) * BITS
        query = q, dq, DQ, lse, queries
        source = K, DK, V, DV, head // (H // Hkv), start, length
        form = scaling, softcap, window

        state = tl.zeros([BLOCK_M, PADDED_V], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        reference = tl.zeros([BLOCK_M], tl.float32)
        total = reference
        for n in range(first, end, BLOCK_N):
            p, ds = _scores(query, source, form, n, SIZE, PADDED, BLOCK_N, True)
            here = tl.sum(p, 1)
            mean = tl.sum(p * ds, 1) / tl.where(here == 0.0, 1.0, here)
            reference = tl.where(total == 0.0, mean, reference)
            total += here
            state = _add(state, p, ds, reference, source, n, MOVES, SIZE_V, PADDED_V, BLOCK_N, True)
        if window is not None:
            state = _walk(
                state, query, reference, source, form, low, whole, MOVES, SIZE, SIZE_V, PADDED, PADDED_V, BLOCK_N, True
            )
        acc, factor = _walk(
            state, query, reference, source, form, whole, first, MOVES, SIZE, SIZE_V, PADDED, PADDED_V, BLOCK_N, False
        )

        if Sinks is not None:
            dsink = 0.0
            if DSinks is not None:
                dsink = tl.load(DSinks + head).to(tl.float32)
            factor += tl.exp2(tl.load(Sinks + head).to(tl.float32) * BITS - lse) * (dsink - reference)
        if MOVES or DSinks is not None:
            o = load_tile(O, head, start, first, length, BLOCK_M, SIZE_V, PADDED_V, True)
            acc -= factor[:, None] * o.to(tl.float32)
        store_tile(Out, acc, head, start, first, length, BLOCK_M, SIZE_V, PADDED_V)


def attention_tangent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dsinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tangent [tokens, H, Dv] of `out`, in its dtype.

    out and lse are what `attention.attention` gave for these q, k, v, sinks and settings, whose shapes and
    dtypes are said there. A tangent dq, dk, dv, dsinks has its primal's shape and dtype, any strides; one
    that is None is 0 and costs nothing. Nothing is checked but the head sizes, nothing synchronizes, and a
    sequence's result is the same bit for bit whatever else is packed with it.
    """
    tokens, H, _ = q.shape
    dout = torch.empty(tokens, H, v.shape[-1], dtype=q.dtype, device=q.device)
    blocks = attention_blocks(ATTENTION_TANGENT, q, v)
    with torch.cuda.device_of(q):
        _attention_tangent_kernel[grid(q, cu_seqlens, blocks.queries)](
            *(strided(x) for x in (q, k, v, out, dq, dk, dv, dout)),
            lse,
            last_contiguous(sinks),
            last_contiguous(dsinks),
            cu_seqlens,
            len(cu_seqlens) - 1,
            tokens,
            H,
            k.shape[1],
            scaling,
            softcap,
            window,
            **sizes(q, v),
            BLOCK_M=blocks.queries,
            BLOCK_N=blocks.keys,
            **options(blocks.num_warps, blocks.num_stages),
        )
    return dout
