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

from .moments import empty_state, merge, merge_lanes, n_parts, store_state, tile_state
from .segments import new_states, stats_of_states
from .softcap import softcapped

BLOCK = 2048  # logits in a tile: 16 to a thread, so that some 7 programs of a multiprocessor hide each other's waits
SEGMENT = 32768  # logits in a segment, about
NUM_WARPS = 4
LANES = 32 * NUM_WARPS


@triton.jit(do_not_specialize=["N", "segments"], do_not_specialize_on_alignment=["Targets", "States", "AtTarget"])
def _token_states_kernel(
    Logits,  # [N, V], any floating dtype
    DLogits,  # [N, V], any floating dtype; not read below order 1
    D2Logits,  # [N, V], any floating dtype; not read below order 2
    Targets,  # [N] int32 or int64
    States,  # [segments, parts, N] float32
    AtTarget,  # [2 + ORDER, N] float32
    N,
    V,
    segments,
    tiles,  # tiles of a segment
    logits_row,
    logits_column,
    dlogits_row,
    dlogits_column,
    d2logits_row,
    d2logits_column,
    targets_stride,
    scale,
    inverse_cap,  # float32; inverse_cap = 1 / softcap, not read unless SOFTCAP
    ORDER: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The segments of a row run side by side: what is read together lies together.
    row = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    Logits += tl.multiple_of(row * logits_row, VECTOR)
    DLogits += tl.multiple_of(row * dlogits_row, VECTOR)
    D2Logits += tl.multiple_of(row * d2logits_row, VECTOR)
    first = segment * tiles * BLOCK
    last = tl.minimum(first + tiles * BLOCK, V)

    width: tl.constexpr = LANES * VECTOR
    repeats: tl.constexpr = BLOCK // width
    columns = tl.arange(0, repeats)[:, None] * width + tl.arange(0, width)[None, :]
    state = empty_state(tl.zeros([1, LANES, 1], dtype=tl.float32))
    for start in range(first, last, BLOCK):
        column = start + columns.to(tl.int64)
        u, d, e = _load(
            Logits,
            DLogits,
            D2Logits,
            column,
            column < V,
            logits_column,
            dlogits_column,
            d2logits_column,
            inverse_cap,
            ORDER,
            SOFTCAP,
        )
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
    u, d, e = _load(
        Logits,
        DLogits,
        D2Logits,
        target,
        mine,
        logits_column,
        dlogits_column,
        d2logits_column,
        inverse_cap,
        ORDER,
        SOFTCAP,
    )
    place = AtTarget + row + one
    tl.store(place, tl.full([1, 1, 1], 1.0, tl.float32), mask=mine)
    tl.store(place + rows, u, mask=mine)
    if ORDER >= 1:
        tl.store(place + 2 * rows, d, mask=mine)
    if ORDER == 2:
        tl.store(place + 3 * rows, e, mask=mine)


@triton.jit
def _load(
    Logits,
    DLogits,
    D2Logits,
    columns,
    mask,
    logits_column,
    dlogits_column,
    d2logits_column,
    inverse_cap,
    ORDER: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """u and its derivatives d and e at `columns` of a row; −inf, 0 and 0 where `mask` is false."""
    u = tl.load(Logits + columns * logits_column, mask=mask, other=float("-inf")).to(tl.float32)
    d, e = tl.zeros_like(u), tl.zeros_like(u)
    if ORDER >= 1:
        d = tl.load(DLogits + columns * dlogits_column, mask=mask, other=0.0).to(tl.float32)
    if ORDER == 2:
        e = tl.load(D2Logits + columns * d2logits_column, mask=mask, other=0.0).to(tl.float32)
    if SOFTCAP:
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
) -> tuple[torch.Tensor, ...]:
    """logp and entropy, with `dlogits` also dlogp and dentropy, with `d2logits` also d2logp and d2entropy.

    Returns a tuple of 2, 4 or 6 float32 tensors [N]. logits, dlogits and d2logits are [N, V] in float16,
    bfloat16 or float32 with any strides, targets [N] int32 or int64, all on one device. Nothing is checked
    and nothing synchronizes; a target outside [0, V) makes its row NaN.
    """
    N, V = logits.shape
    order = 0 if dlogits is None else 1 if d2logits is None else 2
    dlogits, d2logits = (logits if tangent is None else tangent for tangent in (dlogits, d2logits))
    scale, inverse_cap = float(softcap or 1.0) / float(temperature), 1.0 / float(softcap or 1.0)
    vector = 1
    if all(t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in (logits, dlogits, d2logits)):
        vector = 16 // logits.element_size()
    block = min(BLOCK, max(LANES * vector, triton.next_power_of_2(V)))
    # Segments of equal size, so that none is left with the work of a moment.
    segments = triton.cdiv(V, SEGMENT)
    tiles = triton.cdiv(triton.cdiv(V, block), segments)
    states, at_target = new_states(segments, N, order, logits.device)
    if N:
        with torch.cuda.device_of(logits):
            _token_states_kernel[(N * segments,)](
                logits,
                dlogits,
                d2logits,
                targets,
                states,
                at_target,
                N,
                V,
                segments,
                tiles,
                *logits.stride(),
                *dlogits.stride(),
                *d2logits.stride(),
                targets.stride(0),
                scale,
                inverse_cap,
                ORDER=order,
                SOFTCAP=softcap is not None,
                BLOCK=block,
                LANES=LANES,
                VECTOR=vector,
                num_warps=NUM_WARPS,
            )
    return tuple(stats_of_states(states, at_target, order, scale))
