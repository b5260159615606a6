"""Token statistics from hidden states and the head: matrix products and online softmax in one; no logits are stored.

A program multiplies a block of rows with one tile of the vocabulary after the other,

    logits = hidden · weightᵀ + bias,    dlogits = dhidden · weightᵀ + hidden · dweightᵀ + dbias,

in float32 accumulators, and takes each tile through the online softmax of `moments` while it is still in
registers. The vocabulary is cut into segments that depend on its size alone; `segments` merges them. Nothing
depends on the number of rows, so a row's bits do not depend on the rows around it; scratch memory is some
kilobytes per row of a launch, however large the vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .moments import empty_state, merge, n_parts, store_state, tile_state
from .products import dot
from .segments import merge_states, new_states, stats_of_states
from .softcap import softcapped

SEGMENTS = 128  # of a vocabulary, at most: about one for each multiprocessor, so that a few rows fill a device too
GROUP = 16  # blocks of rows that run side by side on one segment, so that its part of the head is read from L2
ROWS_PER_LAUNCH = 8192  # enough to fill a device; what they leave in scratch stays below 32 MiB


class Tile(NamedTuple):
    """A program's share of the products, rows × columns of the vocabulary × depth of a step, and how it is run."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By the products there are: the shapes with which sketches of this kernel were fastest on an H100.
PRIMAL = Tile(128, 256, 64, 8, 3)
FIXED_HEAD = Tile(64, 256, 64, 8, 3)
MOVING_HEAD = Tile(128, 128, 64, 8, 3)
FLOAT32 = Tile(64, 64, 16, 8, 2)  # full float32 products run on the ordinary cores, from registers
ELSEWHERE = Tile(128, 64, 32, 8, 2)  # fits the 64 KiB of shared memory, and registers, that every device has


@triton.jit(
    do_not_specialize=["N", "row_blocks"],
    do_not_specialize_on_alignment=["Bias", "DBias", "Targets", "States", "AtTarget"],
)
def _linear_states_kernel(
    Hidden,
    DHidden,  # [N, D]; DHidden is not read unless HAS_DHIDDEN
    Weight,
    DWeight,  # [V, D]; DWeight is not read unless HAS_DWEIGHT
    Bias,
    DBias,  # [V], any floating dtype; not read unless HAS_BIAS, HAS_DBIAS
    Targets,  # [N] int32 or int64
    States,  # [segments, parts, N] float32
    AtTarget,  # [2 + ORDER, N] float32
    hidden_row,
    hidden_column,
    dhidden_row,
    dhidden_column,  # strides in elements; TMA descriptors have their own
    weight_row,
    weight_column,
    dweight_row,
    dweight_column,
    bias_stride,
    dbias_stride,
    targets_stride,
    N,
    V,
    D,
    row_blocks,
    segments,
    tiles,
    scale,
    inverse_cap,  # tiles of a segment; inverse_cap = 1 / softcap
    HAS_DHIDDEN: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    ORDER: tl.constexpr = 1 if HAS_DHIDDEN or HAS_DWEIGHT or HAS_DBIAS else 0
    # Only a bias can mask. Without one, what lies beyond the vocabulary gets a logit that is finite, without weight.
    BEYOND: tl.constexpr = float("-inf") if HAS_BIAS else -1e30
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
            hidden = _block(Hidden, first_row, k, N, D, hidden_row, hidden_column, ROWS, DEPTH, TMA)
            weight = _block(Weight, start, k, V, D, weight_row, weight_column, COLUMNS, DEPTH, TMA)
            u = dot(hidden, weight.T, u, PRECISION)
            if HAS_DHIDDEN:
                dhidden = _block(DHidden, first_row, k, N, D, dhidden_row, dhidden_column, ROWS, DEPTH, TMA)
                d = dot(dhidden, weight.T, d, PRECISION)
            if HAS_DWEIGHT:
                dweight = _block(DWeight, start, k, V, D, dweight_row, dweight_column, COLUMNS, DEPTH, TMA)
                d_of_head = dot(hidden, dweight.T, d_of_head, PRECISION)
        d += d_of_head
        column = start + tl.arange(0, COLUMNS)[None, :]
        if HAS_BIAS:
            u += tl.load(Bias + column.to(tl.int64) * bias_stride, mask=column < V, other=0.0).to(tl.float32)
        if HAS_DBIAS:
            d += tl.load(DBias + column.to(tl.int64) * dbias_stride, mask=column < V, other=0.0).to(tl.float32)
        if SOFTCAP:
            u, d, _ = softcapped(u, d, d, inverse_cap)
        if start + COLUMNS > V:
            u = tl.where(column < V, u, BEYOND)
        if (least < start + COLUMNS) & (greatest >= start):
            hit = column == target
            u_target += tl.sum(tl.where(hit, u, 0.0), 1, keep_dims=True)
            if ORDER == 1:
                d_target += tl.sum(tl.where(hit, d, 0.0), 1, keep_dims=True)
        state = merge(state, tile_state(u, d, d, scale, ORDER, HAS_BIAS), scale, ORDER)

    rows = N.to(tl.int64)
    store_state(States + segment * n_parts(ORDER) * rows + row, rows, state, there, ORDER)
    tl.store(AtTarget + row, tl.full([ROWS, 1], 1.0, tl.float32), mask=mine)
    tl.store(AtTarget + rows + row, u_target, mask=mine)
    if ORDER == 1:
        tl.store(AtTarget + 2 * rows + row, d_target, mask=mine)


@triton.jit
def _block(
    Source,
    first_row,
    first_column,
    n_rows,
    n_columns,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """[ROWS, COLUMNS] of a matrix, from a descriptor or a pointer; 0 beyond its ends."""
    if TMA:
        return Source.load([first_row, first_column])
    else:
        row = (first_row + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        column = first_column + tl.arange(0, COLUMNS)[None, :]
        return tl.load(
            Source + row * row_stride + column.to(tl.int64) * column_stride,
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
) -> tuple[torch.Tensor, ...]:
    """logp and entropy, and where anything moves also dlogp and dentropy: float32 tensors [N].

    hidden and dhidden are [N, D], weight and dweight [V, D], all of one dtype, float16, bfloat16 or float32, with
    any strides; bias and dbias [V] in any of these; targets [N] int32 or int64; all on one device. Without
    `allow_tf32` products of float32 factors are full float32. Nothing is checked and nothing synchronizes; a
    target outside [0, V) makes its row NaN.

    Where weight is one of several shards of the vocabulary, targets count from its first row and `gather` takes a
    tensor of this shard, [fields, n], to those of all shards in order, [shards, fields, n].
    """
    # Python's own numbers: compiled kernels do not take NumPy's.
    scale, inverse_cap = float((softcap or 1.0) / temperature), float(1.0 / (softcap or 1.0))
    order = int(any(tangent is not None for tangent in (dhidden, dweight, dbias)))
    out = torch.empty(2 + 2 * order, len(hidden), dtype=torch.float32, device=hidden.device)
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
            softcap is not None,
            allow_tf32,
            order,
        )
        if gather is not None:
            shards = gather(torch.cat([merge_states(states, order, scale), at_target]))
            states, at_target = shards[:, : -len(at_target)], shards[:, -len(at_target) :].sum(0)
        out[:, rows] = stats_of_states(states, at_target, order, scale)
        del states  # before the next launch asks for as much
    return tuple(out)


def _launches(rows: int) -> list[slice]:
    """Parts of nearly equal size, so that none is left with a few rows, for which the whole head would be read."""
    launches = max(1, triton.cdiv(rows, ROWS_PER_LAUNCH))
    size = triton.cdiv(triton.cdiv(rows, launches), 128) * 128
    return [slice(start, min(start + size, rows)) for start in range(0, rows, max(size, 1))]


def _states(
    hidden, weight, targets, dhidden, dweight, bias, dbias, scale, inverse_cap, softcap, allow_tf32, order
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of every segment and what is at the targets, as `segments` describes them; one launch."""
    (N, D), V = hidden.shape, len(weight)
    matrices = (hidden, hidden if dhidden is None else dhidden, weight, weight if dweight is None else dweight)
    vectors = (targets if bias is None else bias, targets if dbias is None else dbias, targets)
    tile = _tile(hidden, dhidden, dweight, bias, dbias)
    segments = min(SEGMENTS, triton.cdiv(V, tile.columns))
    tiles = triton.cdiv(triton.cdiv(V, tile.columns), segments)
    segments = triton.cdiv(V, tile.columns * tiles)
    row_blocks = triton.cdiv(N, tile.rows)
    tma = _has_tma(hidden.device) and all(_fits_tma(matrix) for matrix in matrices)
    sources = matrices
    if tma:
        heights = (tile.rows, tile.rows, tile.columns, tile.columns)
        sources = [
            TensorDescriptor.from_tensor(matrix, [height, tile.depth]) for matrix, height in zip(matrices, heights)
        ]
    states, at_target = new_states(segments, N, order, hidden.device)
    with torch.cuda.device_of(hidden):
        _linear_states_kernel[(row_blocks * segments,)](
            *sources,
            *vectors,
            states,
            at_target,
            *(stride for matrix in matrices for stride in matrix.stride()),
            *(vector.stride(0) for vector in vectors),
            N,
            V,
            D,
            row_blocks,
            segments,
            tiles,
            scale,
            inverse_cap,
            HAS_DHIDDEN=dhidden is not None,
            HAS_DWEIGHT=dweight is not None,
            HAS_BIAS=bias is not None,
            HAS_DBIAS=dbias is not None,
            SOFTCAP=softcap,
            PRECISION=_precision(hidden.dtype, allow_tf32),
            TMA=tma,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            GROUP=GROUP,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return states, at_target


def _precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """TF32 matters to float32 factors alone, and few of AMD's devices have it."""
    return "tf32" if allow_tf32 and dtype == torch.float32 and torch.version.hip is None else "ieee"


def _tile(hidden, dhidden, dweight, bias, dbias) -> Tile:
    if hidden.dtype == torch.float32:
        return FLOAT32
    if not _is_like_hopper(hidden.device):
        return ELSEWHERE
    # Wider tiles have no registers left for a bias: they would spill some kilobytes of a thread's.
    if any(tensor is not None for tensor in (dweight, bias, dbias)):
        return MOVING_HEAD
    return PRIMAL if dhidden is None else FIXED_HEAD


@cache
def _is_like_hopper(device: torch.device) -> bool:
    """TMA, and 227 KiB of shared memory for a program: later devices of consumers have 99 KiB."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9 and properties.shared_memory_per_block_optin >= 227 * 1024


def _has_tma(device: torch.device) -> bool:
    """Interpreted kernels have descriptors too."""
    return device.type == "cpu" or _is_like_hopper(device)


def _fits_tma(matrix: torch.Tensor) -> bool:
    """Descriptors want rows that lie whole, one after the other, and start at multiples of 16 bytes."""
    return (
        matrix.numel() > 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
    )
