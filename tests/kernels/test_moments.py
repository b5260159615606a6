"""States of the online softmax and their merges, against moments summed in float64 by brute force."""

import math

import pytest
import torch
import triton
import triton.language as tl
from crosses import crossed
from dentropy.kernels import segments
from dentropy.kernels.moments import (
    State,
    empty_state,
    load_state,
    merge,
    merge_lanes,
    n_parts,
    n_stats,
    store_state,
    tile_state,
)
from truth import assert_as_accurate_as_plain_pytorch

from dentropy import TokenStats

ORDERS = (0, 1, 2)
UNIT = torch.finfo(torch.float32).eps

# Whether a function is compiled or interpreted is settled where it is decorated.
with pytest.MonkeyPatch.context() as patch:
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")

    @triton.jit
    def _tile_kernel(Inputs, Out, rows, V, scale, ORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Inputs [3, rows, V] to states [parts, rows]: a tile of COLUMNS >= V, −inf and NaN beyond V."""
        row = tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, COLUMNS)[None, :]
        at, mask = Inputs + row * V + column, (row < rows) & (column < V)
        u = tl.load(at, mask=mask, other=float("-inf"))
        d = tl.load(at + rows * V, mask=mask, other=float("nan"))
        e = tl.load(at + 2 * rows * V, mask=mask, other=float("nan"))
        store_state(Out + row, rows, tile_state(u, d, e, scale, ORDER), row < rows, ORDER)

    @triton.jit
    def _lanes_kernel(
        Inputs,
        OfLanes,
        Out,
        V,
        scale,
        ORDER: tl.constexpr,
        REPEATS: tl.constexpr,
        LANES: tl.constexpr,
        VECTOR: tl.constexpr,
    ):
        """One row's V = REPEATS · LANES · VECTOR inputs [3, rows, V] to the states of its lanes and of all of them."""
        row, rows = tl.program_id(0), tl.num_programs(0)
        at = Inputs + row * V + tl.reshape(tl.arange(0, REPEATS * LANES * VECTOR), [REPEATS, LANES, VECTOR])
        tile = tile_state(tl.load(at), tl.load(at + rows * V), tl.load(at + 2 * rows * V), scale, ORDER)
        lane = tl.reshape(tl.arange(0, LANES), [1, LANES, 1])
        store_state(OfLanes + lane * n_parts(ORDER) * rows + row, rows, tile, lane >= 0, ORDER)
        one = tl.zeros([1, 1, 1], dtype=tl.int32)
        store_state(Out + row + one, rows, merge_lanes(tile, scale, ORDER), one == 0, ORDER)

    @triton.jit
    def _merge_kernel(A, B, Out, N, scale, ORDER: tl.constexpr, ROWS: tl.constexpr):
        row = tl.arange(0, ROWS)
        mask = row < N
        state = merge(load_state(A + row, N, mask, ORDER), load_state(B + row, N, mask, ORDER), scale, ORDER)
        store_state(Out + row, N, state, mask, ORDER)

    @triton.jit
    def _empty_kernel(Out, N, ORDER: tl.constexpr, ROWS: tl.constexpr):
        row = tl.arange(0, ROWS)
        store_state(Out + row, N, empty_state(row.to(tl.float32)), row < N, ORDER)

    @triton.jit
    def _copy_kernel(From, To, stride, N, ORDER: tl.constexpr, ROWS: tl.constexpr):
        """Loads where row < N and stores everything."""
        row = tl.arange(0, ROWS)
        store_state(To + row, stride, load_state(From + row, stride, row < N, ORDER), row >= 0, ORDER)


def tile_states(inputs, order, scale):
    """[parts, rows] of inputs [3, rows, V]: u, d and e."""
    _, rows, columns = inputs.shape
    out = torch.full((n_parts(order), rows), math.nan, device=inputs.device)
    if rows:
        _tile_kernel[(1,)](
            inputs.contiguous(),
            out,
            rows,
            columns,
            scale,
            ORDER=order,
            ROWS=triton.next_power_of_2(rows),
            COLUMNS=triton.next_power_of_2(columns + 1),
        )
    return out


def merged(a, b, order, scale):
    """The state of two segments together, from theirs [parts, rows]."""
    out = torch.full_like(a, math.nan)
    _merge_kernel[(1,)](a, b, out, a.shape[1], scale, ORDER=order, ROWS=triton.next_power_of_2(a.shape[1]))
    return out


def assert_state_of(state, inputs, scale):
    """Moments within 4 units of rounding of the sum of the sizes of their terms, from the definitions.

    A term is as uncertain as its weight 2^x and its x, both of which are rounded at the size of x. To a mean
    adds what the values whose weight is not 0 in float32 deviate from it on average, whatever their weights.
    """
    u, d, e = inputs.double()
    inside = u > -math.inf
    top = u.amax(1, keepdim=True)
    x, d, e = (torch.where(inside, value, 0.0) for value in ((u - top) * (scale / math.log(2)), d, e))
    w = torch.where(inside, torch.exp2(x), 0.0)
    p = w / w.sum(1, keepdim=True)
    means = {name: (p * value).sum(1, keepdim=True) for name, value in zip("xde", (x, d, e))}
    centred = {name: value - means[name] for name, value in zip("xde", (x, d, e))}
    sizes = {name: value.abs() + (name == "x") for name, value in centred.items()}
    got = dict(zip(State._fields, state.double()))
    torch.testing.assert_close(got["top"], top[:, 0], rtol=0, atol=0)
    there = (w > 2.0**-150) / (w > 2.0**-150).sum(1, keepdim=True)
    uncertainty = 1 + x.abs()
    for part, value in got.items():
        kind, _, factors = part.partition("_")
        if kind == "mean":
            value = value + got.get(f"base_{factors}", 0.0)
            want, size = means[factors][:, 0], (p * uncertainty + there) * sizes[factors]
        elif kind in ("total", "c"):
            want = (w * math.prod(centred[factor] for factor in factors)).sum(1)
            size = w * uncertainty * math.prod(sizes[factor] for factor in factors)
        else:
            continue
        error, unit = (value - want).abs(), UNIT * size.sum(1)
        assert (error <= 4 * unit).all(), f"{part}: {(error / unit).max():.3g} units"


def masked(segment):
    u, d, e = segment
    return torch.stack([torch.full_like(u, -math.inf), torch.full_like(d, math.nan), torch.full_like(e, math.inf)])


def moved(segment, *amounts):
    """Each of u, d and e is 0.01 of itself plus an amount; None leaves it."""
    return torch.stack([t if amount is None else amount + 0.01 * t for t, amount in zip(segment, amounts)])


def under_one_top(segment, gap):
    """The first logit stands `gap` above the others, which are nearly equal; the derivatives have 1000 in common."""
    u, d, e = moved(segment, -gap, 1e3, -1e3)
    u[:, 0] = 0.0
    return torch.stack([u, d, e])


# Each makes a list of segments [3, rows, V] from such a list of at least 3.
CASES = {
    "noise": lambda s: s,
    "maxima 1000 apart": lambda s: [moved(a, 1e3 * (i % 3 - 1), None, None) for i, a in enumerate(s)],
    "maxima 100 apart, downwards": lambda s: [moved(a, -100.0 * i, None, None) for i, a in enumerate(s)],
    "a common part of the derivatives": lambda s: [moved(a, None, 30.0, -30.0) for a in s],
    "a part of each segment's own": lambda s: [moved(a, None, 30.0 * i, -7.0 * i) for i, a in enumerate(s)],
    "a common part but for a first segment of no weight": lambda s: [
        moved(s[0], -1e3, 0.0, 0.0),
        *(moved(a, None, 30.0, -30.0) for a in s[1:]),
    ],
    "one top far above the others": lambda s: [under_one_top(a, 1e4) for a in s],
    "one top just above the others": lambda s: [under_one_top(a, 0.1) for a in s],
    "one top above those of weight 1 together": lambda s: [under_one_top(a, math.log(30)) for a in s],
    "the first masked": lambda s: [masked(s[0]), *(moved(a, None, 30.0, -30.0) for a in s[1:])],
    "the last masked": lambda s: [*s[:-1], masked(s[-1])],
    "all but one masked": lambda s: [masked(s[0]), s[1], *map(masked, s[2:])],
}


# The second order has all moments that the others have: every case with it, and with one of them.
every_case = crossed(
    lambda case, order: torch.cuda.is_available() or order in (2, list(CASES).index(case) % 2), case=CASES, order=ORDERS
)


@pytest.fixture
def draw(device):
    """draw(*columns) -> a list of segments [3, rows, columns]: u, d and e."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.tensor([3.0, 1.0, 1.0])[:, None, None]

    def draw(*columns, rows=5):
        return [(factors * torch.randn(3, rows, n, generator=generator)).to(device) for n in columns]

    return draw


@every_case
def test_segments_merge_in_any_order_and_grouping(draw, case, order):
    scale = 0.7
    parts = CASES[case](draw(17, 1, 30))
    a, b, c = (tile_states(part, order, scale) for part in parts)

    def merge_of(x, y):
        return merged(x, y, order, scale)

    for state, part in zip((a, b, c), parts):
        if part.isfinite().all():
            assert_state_of(state, part, scale)
    whole = torch.cat(parts, 2)
    for state in (
        merge_of(merge_of(a, b), c),
        merge_of(a, merge_of(b, c)),
        merge_of(merge_of(c, a), b),
        merge_of(c, merge_of(b, a)),
    ):
        assert_state_of(state, whole, scale)


@pytest.mark.parametrize("order", ORDERS)
def test_the_empty_state_is_the_identity(draw, order):
    first, second = draw(17, 30, rows=100)
    state = tile_states(first, order, 0.7)
    nothing = torch.full_like(state, math.nan)
    _empty_kernel[(1,)](nothing, 100, ORDER=order, ROWS=128)
    assert torch.equal(tile_states(masked(second), order, 0.7), nothing)
    for a, b, want in ((nothing, state, state), (state, nothing, state), (nothing, nothing, nothing)):
        torch.testing.assert_close(merged(a, b, order, 0.7), want, rtol=0, atol=0)


@every_case
def test_lanes_merge_as_a_sequence_of_segments_does(draw, case, order):
    scale, repeats, lanes, vector = 1.3, 2, 8, 4
    parts = CASES[case](draw(*[repeats * vector] * lanes, rows=2))
    in_place = torch.stack([part.unflatten(2, (repeats, vector)) for part in parts], 3).flatten(2)
    of_lanes = torch.full((lanes, n_parts(order), 2), math.nan, device=in_place.device)
    out = torch.full_like(of_lanes[0], math.nan)
    _lanes_kernel[(2,)](
        in_place,
        of_lanes,
        out,
        repeats * lanes * vector,
        scale,
        ORDER=order,
        REPEATS=repeats,
        LANES=lanes,
        VECTOR=vector,
    )
    for lane, part in zip(of_lanes, parts):
        if part.isfinite().all():
            assert_state_of(lane, part, scale)
    whole = torch.cat(parts, 2)
    assert_state_of(out, whole, scale)
    assert_state_of(segments.merge_states(of_lanes, order, scale), whole, scale)


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_stored_is_loaded(device, order):
    parts = n_parts(order)
    start = torch.randn(parts, 8, generator=torch.Generator().manual_seed(0)).to(device)
    end = torch.full((parts + 1, 8), -7.0, device=device)
    _copy_kernel[(1,)](start, end, 8, 5, ORDER=order, ROWS=8)
    assert torch.equal(end[:parts, :5], start[:, :5])
    assert (end[0, 5:] == -math.inf).all() and (end[1:parts, 5:] == 0).all() and (end[parts] == -7).all()


def states_of(parts, targets, order, scale):
    """What the kernels leave for `segments`: states and the values at the targets."""
    u, d, e = torch.cat(parts, 2)
    at_target = torch.stack([value.gather(1, targets[:, None])[:, 0] for value in (torch.ones_like(u), u, d, e)])
    return torch.stack([tile_states(part, order, scale) for part in parts]), at_target[: 2 + order].contiguous()


@crossed(
    lambda order, rows, columns: (
        torch.cuda.is_available() or order == 2 or (rows == segments.ROWS + 1 and len(columns) > 1)
    ),
    order=ORDERS,
    rows=[0, 1, segments.ROWS - 1, segments.ROWS, segments.ROWS + 1],
    columns=[(9,), (9, 4), (1, 9, 4, 7, 2)],
)
def test_statistics_of_rows_in_segments(draw, columns, rows, order):
    parts = draw(*columns, rows=rows)
    targets = torch.arange(rows, device=parts[0].device) % sum(columns)
    states, at_target = states_of(parts, targets, order, 0.7)
    room = torch.full((len(parts), n_parts(order), rows + 3), math.nan, device=states.device)
    room[..., :rows] = states
    stats = segments.stats_of_states(room[..., :rows], at_target, order, 0.7)
    assert stats.shape == (n_stats(order), rows)
    if rows:
        u, *tangents = torch.cat(parts, 2)[: 1 + order]
        assert_as_accurate_as_plain_pytorch(
            TokenStats(*segments.fields(stats)), u, targets, *tangents, temperature=1 / 0.7
        )
    for few in {min(rows, n) for n in (1, 5)}:
        assert torch.equal(segments.stats_of_states(states[..., :few], at_target[:, :few], order, 0.7), stats[:, :few])


@every_case
def test_statistics_of_hard_segments_and_of_shards(draw, case, order):
    scale = 1.3
    parts = CASES[case](draw(9, 30, 17, 5, 12))
    whole = torch.cat(parts, 2)
    keep = (whole[0] > -math.inf)[0]
    u, *tangents = whole[: 1 + order, :, keep]
    targets = torch.arange(5, device=u.device) % u.shape[1]
    states, at_target = states_of(parts, keep.nonzero()[targets, 0], order, scale)
    shards = torch.stack([segments.merge_states(shard, order, scale) for shard in (states[:2], states[2:])])
    for merged_from in (states, shards):
        stats = TokenStats(*segments.fields(segments.stats_of_states(merged_from, at_target, order, scale)))
        assert_as_accurate_as_plain_pytorch(stats, u, targets, *tangents, temperature=1 / scale)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_without_a_target_or_without_logits(draw, order):
    parts = draw(9, 4)
    for part in parts:
        part[:, 2] = masked(part[:, 2])
    parts[0][:, 3] = masked(parts[0][:, 3])
    states, at_target = states_of(parts, torch.zeros(5, dtype=torch.long, device=parts[0].device), order, 1.0)
    at_target[:, 1] = 0.0
    stats = segments.stats_of_states(states, at_target, order, 1.0)
    assert stats[:, 1:3].isnan().all() and stats[:, [0, 4]].isfinite().all()
    assert stats[0, 3] == -math.inf and stats[1, 3].isfinite()
