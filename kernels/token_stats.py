"""Token statistics from logits: one program per row and segment of the vocabulary, one pass over the logits.

Each lane takes its part of every tile of a segment through the online softmax of `moments`, on its own: the
loop waits for memory alone. Lanes are merged at the end of a segment, the segments of a row by `segments`.
All this depends on V alone, so a row's bits do not depend on the rows around it, and a few rows still make
enough programs to fill a device. Softcap and temperature need no pass of their own: a program
works on u = logits, or u = tanh(logits / softcap), and z = scale · u with scale = 1 / temperature or
softcap / temperature.
"""

import torch
import triton
import triton.language as tl

from .configurations import options
from .matrices import with_strides
from .moments import empty_state, merge, merge_lanes, n_parts, store_state, tile_state
from .segments import fields, new_states, stats_of_states
from .softcap import softcapped

BLOCK = 2048  # logits in a tile: 16 to a thread, so that some 7 programs of a multiprocessor hide each other's waits
SEGMENT = 32768  # logits in a segment, about
NUM_WARPS = 4
LANES = 32 * NUM_WARPS


@triton.jit(do_not_specialize=["N", "segments"], do_not_specialize_on_alignment=["Targets", "States", "AtTarget"])
def _token_states_kernel(
    Logits,  # (pointer, row stride, column stride) of [N, V], any floating dtype
    DLogits,
    D2Logits,  # the same, or None below their order
    Targets,  # [N] int32 or int64
    States,  # [segments, parts, N] float32
    AtTarget,  # [2 + ORDER, N] float32
    N,
    V,
    segments,
    tiles,  # tiles of a segment
    targets_stride,
    scale,
    inverse_cap,  # float32, 1 / softcap, or None
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    ORDER: tl.constexpr = 0 if DLogits is None else 1 if D2Logits is None else 2
    # The segments of a row run side by side: what is read together lies together.
    row = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    sources = _row(Logits, row, VECTOR), _row(DLogits, row, VECTOR), _row(D2Logits, row, VECTOR)
    first = segment * tiles * BLOCK
    last = tl.minimum(first + tiles * BLOCK, V)

    width: tl.constexpr = LANES * VECTOR
    repeats: tl.constexpr = BLOCK // width
    columns = tl.arange(0, repeats)[:, None] * width + tl.arange(0, width)[None, :]
    state = empty_state(tl.zeros([1, LANES, 1], dtype=tl.float32))
    for start in range(first, last, BLOCK):
        column = start + columns.to(tl.int64)
        u, d, e = _load(sources, column, column < V, inverse_cap)
        # As loaded, a thread has VECTOR neighbours of each repeat; as reshaped, they are those of one lane.
        shape: tl.constexpr = [repeats, LANES, VECTOR]
        tile = tile_state(tl.reshape(u, shape), tl.reshape(d, shape), tl.reshape(e, shape), scale, ORDER)
        state = merge(state, tile, scale, ORDER)
    state = merge_lanes(state, scale, ORDER)
    one = tl.zeros([1, 1, 1], dtype=tl.int64)  # what there is of a row are tensors of one element
    rows = N.to(tl.int64)
    store_state(States + segment * n_parts(ORDER) * rows + row + one, rows, state, one == 0, ORDER)

    # A target outside the vocabulary lies in no segment: nothing is read there.
    target = tl.load(Targets + row * targets_stride + one).to(tl.int64)
    mine = (target >= first) & (target < last)
    u, d, e = _load(sources, target, mine, inverse_cap)
    place = AtTarget + row + one
    tl.store(place, tl.full([1, 1, 1], 1.0, tl.float32), mask=mine)
    tl.store(place + rows, u, mask=mine)
    if ORDER >= 1:
        tl.store(place + 2 * rows, d, mask=mine)
    if ORDER == 2:
        tl.store(place + 3 * rows, e, mask=mine)


@triton.jit
def _row(Source, row, VECTOR: tl.constexpr):
    """(pointer to the row, column stride), or None."""
    if Source is None:
        return None
    else:
        return Source[0] + tl.multiple_of(row * Source[1], VECTOR), Source[2]


@triton.jit
def _load(sources, columns, mask, inverse_cap):
    """u and its derivatives d and e at `columns` of a row; −inf, 0 and 0 where `mask` is false."""
    Logits, DLogits, D2Logits = sources
    u = tl.load(Logits[0] + columns * Logits[1], mask=mask, other=float("-inf")).to(tl.float32)
    d, e = tl.zeros_like(u), tl.zeros_like(u)
    if DLogits is not None:
        d = tl.load(DLogits[0] + columns * DLogits[1], mask=mask, other=0.0).to(tl.float32)
    if D2Logits is not None:
        e = tl.load(D2Logits[0] + columns * D2Logits[1], mask=mask, other=0.0).to(tl.float32)
    if inverse_cap is not None:
        u, d, e = softcapped(u, d, e, inverse_cap)
    return u, d, e


def token_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    dlogits: torch.Tensor | None = None,
    d2logits: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """logp, entropy, dlogp, dentropy, d2logp, d2entropy and fisher: float32 tensors [N].

    Without `dlogits` the last five are None, without `d2logits` the second derivatives are. logits, dlogits and
    d2logits are [N, V] in float16, bfloat16 or float32 with any strides, targets [N] int32 or int64, all on one
    device. Nothing is checked and nothing synchronizes; a target outside [0, V) makes its row NaN.
    """
    N, V = logits.shape
    given = [tensor for tensor in (logits, dlogits, d2logits) if tensor is not None]
    order = len(given) - 1
    scale = float(softcap or 1.0) / float(temperature)
    vector = 1
    if all(t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in given):
        vector = 16 // logits.element_size()
    block = min(BLOCK, max(LANES * vector, triton.next_power_of_2(V)))
    # Segments of equal size, so that none is left with the work of a moment.
    segments = triton.cdiv(V, SEGMENT)
    tiles = triton.cdiv(triton.cdiv(V, block), segments)
    states, at_target = new_states(segments, N, order, logits.device)
    if N:
        with torch.cuda.device_of(logits):
            _token_states_kernel[(N * segments,)](
                *(with_strides(tensor) for tensor in (logits, dlogits, d2logits)),
                targets,
                states,
                at_target,
                N,
                V,
                segments,
                tiles,
                targets.stride(0),
                scale,
                None if softcap is None else 1.0 / float(softcap),
                BLOCK=block,
                LANES=LANES,
                VECTOR=vector,
                **options(NUM_WARPS),
            )
    return fields(stats_of_states(states, at_target, order, scale))
