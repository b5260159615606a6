"""Packed causal attention: its output and log-sum-exp.

    s_ij = scaling · q_i · k_j,  softcap · tanh(s / softcap) with a softcap,   o_i = Σ_j exp(s_ij − lse_i) v_j

A packed tensor holds sequences one after the other, bounded by cu_seqlens. Query i sees the keys j ≤ i of its
own sequence, with a window only those of i − j < window. A sink is one more logit of a head, without a value.

A program takes a block of queries of one head and walks the blocks of keys that these queries see, with the
online softmax in float32. Only blocks that a window or the diagonal cuts are masked; blocks that nobody sees
are not read. `query_block`, `key_blocks`, `load_tile` and `seen` are this geometry, shared with the tangent.
"""

import torch
import triton
import triton.language as tl

from .products import dot
from .softcap import softcapped

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e), and exp2 is what the hardware has

# Queries and keys in a block, warps, stages of the pipeline of loads; by bytes of an element and padded head
# size. Chosen by the registers and shared memory that code for sm_90 takes.
CONFIGURATIONS = {
    (2, 64): (128, 64, 4, 3),
    (2, 128): (128, 64, 8, 3),
    (2, 256): (128, 64, 8, 2),
    (4, 64): (64, 64, 8, 2),
    (4, 128): (64, 32, 16, 2),
    (4, 256): (32, 16, 8, 2),
}


@triton.jit
def query_block(CuSeqlens, S, H, BLOCK_M: tl.constexpr):
    """This program's head, its sequence's first token and length, and its first query within the sequence.

    Sequence s begins at slot cu_seqlens[s] // BLOCK_M + s. That leaves it as many slots as it has blocks of
    queries, or one more, so a search in cu_seqlens finds the sequence of a slot, and the grid depends on no
    lengths: nothing is synchronized, and no table made. In a slot left over the first query is not below the
    length. Heads of one slot are neighbours, for they share keys; slots start from the last, so that within a
    sequence the blocks with the most keys to see come first.
    """
    rank = tl.num_programs(0) - 1 - tl.program_id(0)
    slot = rank // H
    s = 0
    beyond = S
    while beyond - s > 1:
        middle = (s + beyond) // 2
        below = tl.load(CuSeqlens + middle).to(tl.int64) // BLOCK_M + middle <= slot
        s = tl.where(below, middle, s)
        beyond = tl.where(below, beyond, middle)
    start = tl.load(CuSeqlens + s).to(tl.int64)
    length = (tl.load(CuSeqlens + s + 1).to(tl.int64) - start).to(tl.int32)
    first = (slot - (start // BLOCK_M + s)).to(tl.int32) * BLOCK_M
    return rank % H, start, length, first


@triton.jit
def key_blocks(first, length, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """low, whole, end: of the keys that queries first, ..., first + BLOCK_M − 1 see, low to whole are cut by
    the window, whole to first are seen by all of them, first to end are cut by causality (and the window)."""
    low = 0
    whole = 0
    if window is not None:
        low = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        whole = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, first)
    return low, whole, tl.minimum(first + BLOCK_M, length)


@triton.jit
def _tile(X, head, start, first, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Where tokens first, ..., first + ROWS − 1 of the sequence at `start` lie in X = (pointer, row stride,
    head stride), and the indices of the tile's rows and columns."""
    pointer, row_stride, head_stride = X
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    corner = pointer + (start + first) * row_stride + head.to(tl.int64) * head_stride  # start is int64
    return corner + rows * row_stride + columns, rows, columns


@triton.jit
def load_tile(
    X, head, start, first, length, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr
):
    """[ROWS, PADDED]: columns from SIZE on are 0, and so are tokens from `length` on. Only a RAGGED tile may
    reach there."""
    place, rows, columns = _tile(X, head, start, first, ROWS, PADDED)
    if RAGGED and SIZE < PADDED:
        return tl.load(place, mask=(rows < length - first) & (columns < SIZE), other=0.0)
    elif RAGGED:
        return tl.load(place, mask=rows < length - first, other=0.0)
    elif SIZE < PADDED:
        return tl.load(place, mask=columns < SIZE, other=0.0)
    else:
        return tl.load(place)


@triton.jit
def store_tile(X, tile, head, start, first, length, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    place, rows, columns = _tile(X, head, start, first, ROWS, PADDED)
    tl.store(place, tile.to(X[0].dtype.element_ty), mask=(rows < length - first) & (columns < SIZE))


@triton.jit
def seen(queries, keys, window):
    """Whether each of `queries` sees each of `keys`, [queries, keys]."""
    distance = queries[:, None] - keys[None, :]
    if window is not None:
        return (distance >= 0) & (distance < window)
    else:
        return distance >= 0


@triton.jit
def _attend(
    state,
    q,
    queries,
    source,
    low,
    high,
    scaling,
    softcap,
    window,
    SIZE: tl.constexpr,
    SIZE_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online softmax over keys low, ..., high − 1: top (in units of log 2), total, and Σ exp(s) v."""
    top, total, acc = state
    K, V, head, start, length = source
    for n in range(low, high, BLOCK_N):
        k = load_tile(K, head, start, n, length, BLOCK_N, SIZE, PADDED, MASKED)
        s = dot(q, k.T, tl.zeros([q.shape[0], BLOCK_N], tl.float32), "ieee")
        if softcap is not None:
            s = softcapped(s, s, s, scaling / softcap)[0] * (softcap * LOG2E)
        else:
            s *= scaling * LOG2E
        if MASKED:
            s = tl.where(seen(queries, n + tl.arange(0, BLOCK_N), window), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A query that has seen nothing yet: without the guard −inf − (−inf) would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        p = tl.exp2(s - base[:, None])
        rescale = tl.exp2(top - base)
        top = new_top
        total = total * rescale + tl.sum(p, 1)
        v = load_tile(V, head, start, n, length, BLOCK_N, SIZE_V, PADDED_V, MASKED)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None], "ieee")
    return top, total, acc


@triton.jit(do_not_specialize=["S", "tokens", "window"])
def _attention_kernel(
    Q,
    K,
    V,
    Out,  # (pointer, row stride, head stride) of [tokens, H or Hkv, D or Dv]
    Lse,  # [H, tokens] float32
    Sinks,  # [H], or None
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
    head, start, length, first = query_block(CuSeqlens, S, H, BLOCK_M)
    if first < length:
        low, whole, end = key_blocks(first, length, window, BLOCK_M, BLOCK_N)
        queries = first + tl.arange(0, BLOCK_M)
        q = load_tile(Q, head, start, first, length, BLOCK_M, SIZE, PADDED, True)
        source = (K, V, head // (H // Hkv), start, length)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if Sinks is not None:
            top = tl.zeros([BLOCK_M], tl.float32) + tl.load(Sinks + head).to(tl.float32) * LOG2E
            total += 1.0
        state = top, total, tl.zeros([BLOCK_M, PADDED_V], tl.float32)
        # In this order: masks in the first loop keep ptxas from overlapping its products.
        state = _attend(
            state,
            q,
            queries,
            source,
            whole,
            first,
            scaling,
            softcap,
            window,
            SIZE,
            SIZE_V,
            PADDED,
            PADDED_V,
            BLOCK_N,
            False,
        )
        if window is not None:
            state = _attend(
                state,
                q,
                queries,
                source,
                low,
                whole,
                scaling,
                softcap,
                window,
                SIZE,
                SIZE_V,
                PADDED,
                PADDED_V,
                BLOCK_N,
                True,
            )
        state = _attend(
            state,
            q,
            queries,
            source,
            first,
            end,
            scaling,
            softcap,
            window,
            SIZE,
            SIZE_V,
            PADDED,
            PADDED_V,
            BLOCK_N,
            True,
        )
        top, total, acc = state
        lse = (top + tl.log2(total)) / LOG2E
        tl.store(Lse + head.to(tl.int64) * tokens + start + queries, lse, mask=queries < length)
        store_tile(Out, acc / total[:, None], head, start, first, length, BLOCK_M, SIZE_V, PADDED_V)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [tokens, H, Dv] in the dtype of q, and log-sum-exp [H, tokens] in float32, in nats, with softcap
    and sink included.

    q [tokens, H, D], k [tokens, Hkv, D], v [tokens, Hkv, Dv]: float16, bfloat16 or float32, all of one dtype,
    any strides; D and Dv up to 256, ValueError beyond; H a multiple of Hkv, and head h uses key head
    h // (H // Hkv). cu_seqlens [S + 1], int32 or int64, contiguous, from 0 to tokens; max_length, the longest
    sequence's length or more; sinks [H], any floating dtype. Nothing else is checked, nothing synchronizes.

    PyTorch's packed flash attention does it where it can, the kernel above everything else.
    """
    if _flash_attention_serves(q, v, cu_seqlens, softcap, sinks):
        cu_seqlens = cu_seqlens.to(torch.int32)
        # Its window counts the keys before the query's own. PyTorch 2.11 and 2.13 both take these arguments;
        # varlen_attn, which does the same, wants enable_gqa in 2.13 and does not know it in 2.11.
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            last_contiguous(q),
            last_contiguous(k),
            last_contiguous(v),
            cu_seqlens,
            cu_seqlens,
            max_length,
            max_length,
            dropout_p=0.0,
            is_causal=window is None,
            return_debug_mask=False,
            scale=scaling,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=0,
        )
        return out, lse
    return packed_attention(q, k, v, cu_seqlens, scaling=scaling, window=window, softcap=softcap, sinks=sinks)


def _flash_attention_serves(q, v, cu_seqlens, softcap, sinks) -> bool:
    return (
        q.is_cuda
        and torch.backends.cuda.is_flash_attention_available()
        and softcap is None
        and sinks is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and len(q) > 0
        and q.shape[-1] == v.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
        and len(cu_seqlens) - 1 <= 65535  # its grid's second dimension counts sequences
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def packed_attention(q, k, v, cu_seqlens, *, scaling, window=None, softcap=None, sinks=None):
    """`attention` by the kernel of this file."""
    tokens, H, _ = q.shape
    out = torch.empty(tokens, H, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(H, tokens, dtype=torch.float32, device=q.device)
    block_m, block_n, warps, stages = configuration(q, v, CONFIGURATIONS)
    with torch.cuda.device_of(q):
        _attention_kernel[grid(q, cu_seqlens, block_m)](
            *(strided(x) for x in (q, k, v, out)),
            lse,
            last_contiguous(sinks),
            cu_seqlens,
            len(cu_seqlens) - 1,
            tokens,
            H,
            k.shape[1],
            scaling,
            softcap,
            window,
            **sizes(q, v),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
        )
    return out, lse


def configuration(q: torch.Tensor, v: torch.Tensor, table: dict) -> tuple[int, int, int, int]:
    padded = max(64, *(sizes(q, v)[name] for name in ("PADDED", "PADDED_V")))
    if padded > 256:
        raise ValueError(f"head size is {q.shape[-1]} for queries and {v.shape[-1]} for values, expected at most 256")
    return table[q.element_size(), padded]


def sizes(q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """Head sizes of queries and values, and the powers of two that tiles are padded to."""
    return dict(
        SIZE=q.shape[-1],
        SIZE_V=v.shape[-1],
        PADDED=max(16, triton.next_power_of_2(q.shape[-1])),
        PADDED_V=max(16, triton.next_power_of_2(v.shape[-1])),
    )


def grid(q: torch.Tensor, cu_seqlens: torch.Tensor, block_m: int) -> tuple[int]:
    """One program for each head of each slot of `query_block`."""
    return ((q.shape[0] // block_m + len(cu_seqlens) - 1) * q.shape[1],)


def strided(x: torch.Tensor | None) -> tuple[torch.Tensor, int, int] | None:
    """What `load_tile` takes. The row stride is a compile-time constant: that saves some 30 registers, and it
    is the same for every number of tokens, which the head stride need not be. That of a single token does not
    matter."""
    if x is None:
        return None
    x = last_contiguous(x)
    row_stride = x.stride(0) if len(x) > 1 else x.shape[1] * x.shape[2]
    return x, tl.constexpr(row_stride), x.stride(1)


def last_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()
