"""Packed sequences: which block of queries a program has, which keys these see, and where their tiles lie.

A packed tensor [tokens, heads, size] holds sequences one after the other, bounded by cu_seqlens. Query i sees the keys
j ≤ i of its own sequence, with a window only those of i − j < window. A program has a block of queries of one head
and walks the blocks of keys that these queries see. Only blocks that a window or the diagonal cuts are masked; blocks
that nobody sees are not read.
"""

import torch
import triton
import triton.language as tl


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
