"""Token statistics from hidden states and the head: matrix products and online softmax in one; no logits are stored.

A program multiplies a block of rows with one tile of the vocabulary after the other,

    logits = hidden · weightᵀ + bias,    dlogits = dhidden · weightᵀ + hidden · dweightᵀ + dbias,

in float32 accumulators, and takes each tile through the online softmax of `moments` while it is still in
registers. The vocabulary is cut into segments that depend on its size alone; `segments` merges them. Nothing
depends on the number of rows, so a row's bits do not depend on the rows around it; scratch memory is some
kilobytes per row of a launch, however large the vocabulary.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .configurations import has_descriptors, head_tile, options, precision
from .matrices import descriptor, fits_a_descriptor, with_strides
from .moments import empty_state, merge, n_parts, n_stats, store_state, tile_state
from .products import dot_apart
from .segments import fields, merge_states, new_states, stats_of_states
from .softcap import softcapped

SEGMENTS = 128  # of a vocabulary, at most: about one for each multiprocessor, so that a few rows fill a device too
GROUP = 16  # blocks of rows that run side by side on one segment, so that its part of the head is read from L2
ROWS_PER_LAUNCH = 8192  # enough to fill a device; what they leave in scratch stays below 32 MiB


@triton.jit(
    do_not_specialize=["N", "row_blocks"],
    do_not_specialize_on_alignment=["Bias", "DBias", "Targets", "States", "AtTarget"],
)
def _linear_states_kernel(
    Hidden,  # of [N, D], a TMA descriptor or (pointer, row stride, column stride)
    DHidden,  # the same, or None
    Weight,  # the same of [V, D]
    DWeight,  # the same, or None
    Bias,
    DBias,  # [V], any floating dtype, or None
    Targets,  # [N] int32 or int64
    States,  # [segments, parts, N] float32
    AtTarget,  # [2 + ORDER, N] float32
    bias_stride,
    dbias_stride,
    targets_stride,
    N,
    V,
    D,
    row_blocks,
    segments,
    tiles,  # tiles of a segment
    scale,
    inverse_cap,  # 1 / softcap, or None
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    ORDER: tl.constexpr = 0 if DHidden is None and DWeight is None and DBias is None else 1
    MASKED: tl.constexpr = Bias is not None
    # Only a bias can mask. Without one, what lies beyond the vocabulary gets a logit that is finite, without weight.
    BEYOND: tl.constexpr = float("-inf") if MASKED else -1e30
    # GROUP blocks of rows on segment 0, the same on segment 1, ...; then the next GROUP.
    first_block = tl.program_id(0) // (GROUP * segments) * GROUP
    blocks = tl.minimum(row_blocks - first_block, GROUP)
    within = tl.program_id(0) % (GROUP * segments)
    first_row = (first_block + within % blocks) * ROWS
    segment = within // blocks
    first = segment * tiles * COLUMNS
    last = tl.minimum(first + tiles * COLUMNS, V)

    row = (first_row + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    there = row < N
    target = tl.load(Targets + row * targets_stride, mask=there, other=-1)
    mine = (target >= first) & (target < last)  # a target outside the vocabulary lies in no segment
    target = tl.where(mine, target, -1).to(tl.int32)  # as the columns are: half the registers, half the comparisons
    # Few tiles have a target of these rows in them: between the least and the greatest of this segment.
    least = tl.min(tl.where(mine, target, last))
    greatest = tl.max(tl.where(mine, target, first - 1))
    state = empty_state(tl.zeros([ROWS, 1], dtype=tl.float32))
    u_target = tl.zeros([ROWS, 1], dtype=tl.float32)
    d_target = tl.zeros([ROWS, 1], dtype=tl.float32)
    for start in range(first, last, COLUMNS):
        u = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        d = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        # An accumulator of its own: two products into one would wait for each other in every step.
        d_of_head = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for k in range(0, D, DEPTH):
            hidden = _block(Hidden, first_row, k, N, D, ROWS, DEPTH, TMA)
            weight = _block(Weight, start, k, V, D, COLUMNS, DEPTH, TMA)
            u = dot_apart(hidden, weight.T, u, PRECISION)
            if DHidden is not None:
                dhidden = _block(DHidden, first_row, k, N, D, ROWS, DEPTH, TMA)
                d = dot_apart(dhidden, weight.T, d, PRECISION)
            if DWeight is not None:
                dweight = _block(DWeight, start, k, V, D, COLUMNS, DEPTH, TMA)
                d_of_head = dot_apart(hidden, dweight.T, d_of_head, PRECISION)
        d += d_of_head
        column = start + tl.arange(0, COLUMNS)[None, :]
        if Bias is not None:
            u += tl.load(Bias + column.to(tl.int64) * bias_stride, mask=column < V, other=0.0).to(tl.float32)
        if DBias is not None:
            d += tl.load(DBias + column.to(tl.int64) * dbias_stride, mask=column < V, other=0.0).to(tl.float32)
        if inverse_cap is not None:
            u, d, _ = softcapped(u, d, d, inverse_cap)
        if start + COLUMNS > V:
            u = tl.where(column < V, u, BEYOND)
        if (least < start + COLUMNS) & (greatest >= start):
            hit = column == target
            u_target += tl.sum(tl.where(hit, u, 0.0), 1, keep_dims=True)
            if ORDER == 1:
                d_target += tl.sum(tl.where(hit, d, 0.0), 1, keep_dims=True)
        state = merge(state, tile_state(u, d, d, scale, ORDER, MASKED), scale, ORDER)

    rows = N.to(tl.int64)
    store_state(States + segment * n_parts(ORDER) * rows + row, rows, state, there, ORDER)
    tl.store(AtTarget + row, tl.full([ROWS, 1], 1.0, tl.float32), mask=mine)
    tl.store(AtTarget + rows + row, u_target, mask=mine)
    if ORDER == 1:
        tl.store(AtTarget + 2 * rows + row, d_target, mask=mine)


@triton.jit
def _block(
    Source, first_row, first_column, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """[ROWS, COLUMNS] of a matrix; 0 beyond its ends."""
    if TMA:
        return Source.load([first_row, first_column])
    else:
        pointer, row_stride, column_stride = Source
        row = (first_row + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        column = first_column + tl.arange(0, COLUMNS)[None, :]
        return tl.load(
            pointer + row * row_stride + column.to(tl.int64) * column_stride,
            mask=(row < n_rows) & (column < n_columns),
            other=0.0,
        )


def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dhidden: torch.Tensor | None = None,
    dweight: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    allow_tf32: bool = False,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """logp, entropy, dlogp, dentropy, None, None and fisher: float32 tensors [N], or None where nothing moves.

    hidden and dhidden are [N, D], weight and dweight [V, D], all of one dtype, float16, bfloat16 or float32, with
    any strides; bias and dbias [V] in any of these; targets [N] int32 or int64; all on one device. Without
    `allow_tf32` products of float32 factors are as accurate as float32's own. Nothing is checked and nothing
    synchronizes; a target outside [0, V) makes its row NaN.

    Where weight is one of several shards of the vocabulary, targets count from its first row and `gather` takes a
    tensor of this shard, [fields, n], to those of all shards in order, [shards, fields, n].
    """
    # Python's own numbers: compiled kernels do not take NumPy's.
    scale = float((softcap or 1.0) / temperature)
    inverse_cap = None if softcap is None else float(1.0 / softcap)
    order = int(any(tangent is not None for tangent in (dhidden, dweight, dbias)))
    out = torch.empty(n_stats(order), len(hidden), dtype=torch.float32, device=hidden.device)
    for rows in _launches(len(hidden)):
        states, at_target = _states(
            hidden[rows],
            weight,
            targets[rows],
            None if dhidden is None else dhidden[rows],
            dweight,
            bias,
            dbias,
            scale,
            inverse_cap,
            allow_tf32,
            order,
        )
        if gather is not None:
            shards = gather(torch.cat([merge_states(states, order, scale), at_target]))
            states, at_target = shards[:, : -len(at_target)], shards[:, -len(at_target) :].sum(0)
        out[:, rows] = stats_of_states(states, at_target, order, scale)
        del states  # before the next launch asks for as much
    return fields(out)


def _launches(rows: int) -> list[slice]:
    """Parts of nearly equal size, so that none is left with a few rows, for which the whole head would be read."""
    launches = max(1, triton.cdiv(rows, ROWS_PER_LAUNCH))
    size = triton.cdiv(triton.cdiv(rows, launches), 128) * 128
    return [slice(start, min(start + size, rows)) for start in range(0, rows, max(size, 1))]


def _states(
    hidden, weight, targets, dhidden, dweight, bias, dbias, scale, inverse_cap, allow_tf32, order
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of every segment and what is at the targets, as `segments` describes them; one launch."""
    (N, D), V = hidden.shape, len(weight)
    matrices, vectors = (hidden, dhidden, weight, dweight), (bias, dbias, targets)
    aligned = all(fits_a_descriptor(matrix) for matrix in matrices if matrix is not None)
    descriptors = aligned and has_descriptors(hidden.device)
    tile = head_tile(hidden, dhidden, dweight, (bias, dbias), aligned)
    segments = min(SEGMENTS, triton.cdiv(V, tile.columns))
    tiles = triton.cdiv(triton.cdiv(V, tile.columns), segments)
    segments = triton.cdiv(V, tile.columns * tiles)
    row_blocks = triton.cdiv(N, tile.rows)
    heights = (tile.rows, tile.rows, tile.columns, tile.columns)
    states, at_target = new_states(segments, N, order, hidden.device)
    with torch.cuda.device_of(hidden):
        _linear_states_kernel[(row_blocks * segments,)](
            *(
                descriptor(matrix, height, tile.depth) if descriptors else with_strides(matrix)
                for matrix, height in zip(matrices, heights)
            ),
            *vectors,
            states,
            at_target,
            *(None if vector is None else vector.stride(0) for vector in vectors),
            N,
            V,
            D,
            row_blocks,
            segments,
            tiles,
            scale,
            inverse_cap,
            PRECISION=precision(hidden, allow_tf32),
            TMA=descriptors,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            GROUP=GROUP,
            **options(tile.num_warps, tile.num_stages),
        )
    return states, at_target
