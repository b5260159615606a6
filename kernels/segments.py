"""From the states of a vocabulary's segments to the statistics of each row.

The kernels that read logits, or make them, cut the vocabulary into segments that depend on its size alone,
give each segment of each row to one program, and leave here

    states     [segments, parts, N] float32: the online softmax of `moments`, its parts in order
    at_target  [2 + order, N] float32: 1 and the target's u, d, e, written by the segment that has the target;
               a column that nobody wrote stays 0 and makes its row NaN

Segments are loaded side by side and merged as lanes, in a tree that depends on their number alone, so a row's bits do
not depend on who computed them, or on the rows around it. Shards of a vocabulary are merged the same way, in the order
of their ranks.
"""

import torch
import triton
import triton.language as tl

from .configurations import options
from .moments import empty_state, load_state, merge, merge_lanes, n_parts, n_stats, stats_of_state, store_state

ROWS = 8  # of a program: a sector of memory of each part of each segment
LANES = 128  # segments that are loaded at a time, at most


@triton.jit
def _rows(N, ROWS: tl.constexpr):
    """This program's rows [1, 1, ROWS], and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, None, :]
    return row, row < N


@triton.jit
def _merged(
    States, n_segments, segment_stride, part_stride, scale, row, mask, ORDER: tl.constexpr, LANES: tl.constexpr
):
    """The states [1, 1, ROWS] of all segments together."""
    state = empty_state(tl.zeros_like(row).to(tl.float32))
    for first in range(0, n_segments, LANES):
        segment = first + tl.arange(0, LANES)[None, :, None].to(tl.int64)
        place = States + segment * segment_stride + row
        lanes = load_state(place, part_stride, mask & (segment < n_segments), ORDER)
        state = merge(state, merge_lanes(lanes, scale, ORDER), scale, ORDER)
    return state


@triton.jit(do_not_specialize=["N", "n_segments", "segment_stride", "part_stride", "target_stride"])
def _stats_kernel(
    States,  # [n_segments, parts, N] float32
    AtTarget,  # [2 + ORDER, N] float32
    Out,  # [statistics, N] float32
    N,
    n_segments,
    segment_stride,
    part_stride,
    target_stride,
    scale,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    row, mask = _rows(N, ROWS)
    state = _merged(States, n_segments, segment_stride, part_stride, scale, row, mask, ORDER, LANES)
    found = tl.load(AtTarget + row, mask=mask, other=0.0) == 1.0
    u = tl.load(AtTarget + target_stride + row, mask=mask, other=0.0)
    d, e = tl.zeros_like(u), tl.zeros_like(u)
    if ORDER >= 1:
        d = tl.load(AtTarget + 2 * target_stride + row, mask=mask, other=0.0)
    if ORDER == 2:
        e = tl.load(AtTarget + 3 * target_stride + row, mask=mask, other=0.0)
    stats = stats_of_state(state, u, d, e, scale, ORDER)
    for field in tl.static_range(n_stats(ORDER)):
        tl.store(Out + field * N.to(tl.int64) + row, tl.where(found, stats[field], float("nan")), mask=mask)


@triton.jit(do_not_specialize=["N", "n_segments", "segment_stride", "part_stride"])
def _merge_kernel(
    States,  # [n_segments, parts, N] float32
    Out,  # [parts, N] float32
    N,
    n_segments,
    segment_stride,
    part_stride,
    scale,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    row, mask = _rows(N, ROWS)
    state = _merged(States, n_segments, segment_stride, part_stride, scale, row, mask, ORDER, LANES)
    store_state(Out + row, N.to(tl.int64), state, mask, ORDER)


def new_states(segments: int, rows: int, order: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for `states`, and `at_target` filled with zeros."""
    return (
        torch.empty(segments, n_parts(order), rows, dtype=torch.float32, device=device),
        torch.zeros(2 + order, rows, dtype=torch.float32, device=device),
    )


def merge_states(states: torch.Tensor, order: int, scale: float) -> torch.Tensor:
    """The state [parts, N] of all segments together, from `states` [segments, parts, N]."""
    segments, parts, rows = states.shape
    out = torch.empty(parts, rows, dtype=torch.float32, device=states.device)
    if rows:
        with torch.cuda.device_of(states):
            _merge_kernel[(triton.cdiv(rows, ROWS),)](
                states, out, rows, segments, *states.stride()[:2], scale, ORDER=order, **_shape(segments), **options()
            )
    return out


def stats_of_states(states: torch.Tensor, at_target: torch.Tensor, order: int, scale: float) -> torch.Tensor:
    """logp, entropy, dlogp, dentropy, fisher, d2logp, d2entropy, as far as `order` goes: [2, 5 or 7, N] float32.

    The strides of the last dimension of both inputs are 1.
    """
    segments, _, rows = states.shape
    out = torch.empty(n_stats(order), rows, dtype=torch.float32, device=states.device)
    if rows:
        with torch.cuda.device_of(states):
            _stats_kernel[(triton.cdiv(rows, ROWS),)](
                states,
                at_target,
                out,
                rows,
                segments,
                *states.stride()[:2],
                at_target.stride(0),
                scale,
                ORDER=order,
                **_shape(segments),
                **options(),
            )
    return out


def fields(stats: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """logp, entropy, dlogp, dentropy, d2logp, d2entropy, fisher, [N] each, from `stats_of_states`; None for what is
    of a higher order."""
    logp, entropy, dlogp, dentropy, fisher, d2logp, d2entropy = (*stats, *[None] * (n_stats(2) - len(stats)))
    return logp, entropy, dlogp, dentropy, d2logp, d2entropy, fisher


def _shape(segments: int) -> dict[str, int]:
    return dict(ROWS=ROWS, LANES=min(LANES, triton.next_power_of_2(segments)))
