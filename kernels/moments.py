"""The online softmax with moments up to second order: the state of a segment of a vocabulary, and how two merge.

Logits are z = scale · u with derivatives ż = scale · d and z̈ = scale · e; x = (z − max z) / ln 2 ≤ 0, in bits,
has the weight w = 2^x. `State` has a segment's sums. Moments are centred, so nothing cancels when they become
covariances, and a mean is kept in two parts, so that a part common to the derivatives of a whole row costs
no digits. Two states merge into that of both segments (Chan, Golub and LeVeque's update of centred moments),
in any order and grouping up to rounding: tiles of a loop, splits of a vocabulary and shards of it all use
`merge`, and `merge_lanes` merges many at once.

A logit of −inf is outside the vocabulary: it has weight 0 and its derivatives, whatever they are, are never
looked at. So is one that a scale above 1 takes there.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Bits, because 2^x is one instruction and eˣ is three.
BITS = tl.constexpr(1.4426950408889634)  # of a nat
NATS = tl.constexpr(0.6931471805599453)  # of a bit
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of the finite float32 numbers


class State(NamedTuple):
    """Order 0 has the first 3 parts, order 1 the first 7, order 2 all; the others are 0."""

    top: tl.tensor  # max u, −inf for a segment without logits
    total: tl.tensor  # Σ w
    mean_x: tl.tensor  # Σ w x / Σ w
    base_d: tl.tensor  # about the mean of d
    mean_d: tl.tensor  # Σ w d / Σ w − base_d
    c_xd: tl.tensor  # Σ w (x − E x)(d − E d)
    c_dd: tl.tensor  # Σ w (d − E d)²
    base_e: tl.tensor  # as base_d, for e
    mean_e: tl.tensor  # Σ w e / Σ w − base_e
    c_xe: tl.tensor  # Σ w (x − E x)(e − E e)
    c_xdd: tl.tensor  # Σ w (x − E x)(d − E d)²


@triton.jit
def empty_state(TEMPLATE):
    """The state of a segment without logits, one for each element of TEMPLATE."""
    zero = tl.zeros_like(TEMPLATE)
    return State(zero - float("inf"), zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def tile_state(u, d, e, scale, ORDER: tl.constexpr, MASKED: tl.constexpr = True):
    """The states of a tile of logits u and derivatives d and e (float32), over the axes that `_sum` names.

    MASKED: a logit may be −inf; otherwise all of scale · u is finite, and what masks cost is left out.
    """
    top = _max(u)
    if MASKED:
        # Without the guard an empty tile would give −inf − (−inf) = NaN.
        x = (u - tl.maximum(top, LOWEST)) * (scale * BITS)
        masked = x == float("-inf")
        weight = tl.exp2(x)
        x = tl.maximum(x, -1e4)  # finite, so that 0 · x is 0
        d = tl.where(masked, 0.0, d)
        e = tl.where(masked, 0.0, e)
    else:
        x = (u - top) * (scale * BITS)
        weight = tl.exp2(x)
    total = _sum(weight)
    share = 1.0 / tl.maximum(total, 1.0)
    mean_x = _sum(weight * x) * share
    # x is not centred: products with it round at its size, as x itself has. Its largest, 0, has the weight 1 of at
    # most n, so Var x ≥ (E x)² / n: the mean is at most √n standard deviations, n the logits of a tile.
    zero = tl.zeros_like(mean_x)
    base_d, mean_d, c_xd, c_dd = zero, zero, zero, zero
    base_e, mean_e, c_xe, c_xdd = zero, zero, zero, zero
    if ORDER >= 1:
        base_d = _sum(weight * d) * share
        d -= base_d
        weighted_d = weight * d
        rest_d = _sum(weighted_d)  # what rounding left of the first mean
        mean_d = rest_d * share
        c_xd = _sum(weighted_d * x) - rest_d * mean_x
        c_dd = _sum(weighted_d * d) - rest_d * mean_d
        if ORDER == 2:
            base_e = _sum(weight * e) * share
            weighted_e = weight * (e - base_e)
            rest_e = _sum(weighted_e)
            mean_e = rest_e * share
            c_xe = _sum(weighted_e * x) - rest_e * mean_x
            c_xdd = _sum(weighted_d * d * x) - (c_dd + rest_d * mean_d) * mean_x - 2.0 * mean_d * c_xd
    return State(top, total, mean_x, base_d, mean_d, c_xd, c_dd, base_e, mean_e, c_xe, c_xdd)


@triton.jit
def _sum(x):
    """Over the columns of a tile [rows, columns], or what each lane has of one [repeats, lanes, vector]."""
    if len(x.shape) == 2:
        return tl.sum(x, 1, keep_dims=True)
    else:
        return tl.sum(tl.sum(x, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def _max(x):
    if len(x.shape) == 2:
        return tl.max(x, 1, keep_dims=True)
    else:
        return tl.max(tl.max(x, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def merge(a, b, scale, ORDER: tl.constexpr):
    """The state of two segments together."""
    top = tl.maximum(a.top, b.top)
    shift_a = _shift(a.top, top, scale)
    shift_b = _shift(b.top, top, scale)
    rescale_a = tl.exp2(shift_a)
    rescale_b = tl.exp2(shift_b)
    total_a = a.total * rescale_a
    total_b = b.total * rescale_b
    first = total_a == 0.0  # nothing of weight before b
    total = total_a + total_b
    share = 1.0 / tl.maximum(total, 1.0)
    share_a = tl.where(total_b == 0.0, 1.0, total_a * share)
    share_b = tl.where(first, 1.0, total_b * share)
    mean_x_a = a.mean_x + shift_a
    mean_x_b = b.mean_x + shift_b
    # Weighted sums rather than mean_a + share_b · (mean_b − mean_a): that would round at the size of a mean
    # whose weight is nothing.
    mean_x = share_a * mean_x_a + share_b * mean_x_b
    zero = tl.zeros_like(mean_x)
    base_d, mean_d, c_xd, c_dd = zero, zero, zero, zero
    base_e, mean_e, c_xe, c_xdd = zero, zero, zero, zero
    if ORDER >= 1:
        base_d = tl.where(first, b.base_d, a.base_d)
        mean_d_b = b.mean_d + (b.base_d - base_d)
        mean_d = share_a * a.mean_d + share_b * mean_d_b
        apart_x = mean_x_b - mean_x_a
        apart_d = mean_d_b - a.mean_d
        between = total_a * share_b
        between_d = between * apart_d
        c_xd_a = a.c_xd * rescale_a
        c_xd_b = b.c_xd * rescale_b
        c_xd = c_xd_a + c_xd_b + between_d * apart_x
        c_dd_a = a.c_dd * rescale_a
        c_dd_b = b.c_dd * rescale_b
        c_dd = c_dd_a + c_dd_b + between_d * apart_d
        if ORDER == 2:
            base_e = tl.where(first, b.base_e, a.base_e)
            mean_e_b = b.mean_e + (b.base_e - base_e)
            mean_e = share_a * a.mean_e + share_b * mean_e_b
            c_xe = a.c_xe * rescale_a + b.c_xe * rescale_b + between * apart_x * (mean_e_b - a.mean_e)
            # Each segment's third moment about the common means; theirs are share · apart from its own.
            c_xdd = (
                a.c_xdd * rescale_a
                + b.c_xdd * rescale_b
                + 2.0 * apart_d * (share_a * c_xd_b - share_b * c_xd_a)
                + apart_x * (share_a * c_dd_b - share_b * c_dd_a)
                + between_d * apart_d * (share_a - share_b) * apart_x
            )
    return State(top, total, mean_x, base_d, mean_d, c_xd, c_dd, base_e, mean_e, c_xe, c_xdd)


@triton.jit
def merge_lanes(a, scale, ORDER: tl.constexpr):
    """The states of all lanes together, [1, 1, n], from states `a` [1, lanes, n]."""
    top = tl.max(a.top, 1, keep_dims=True)
    shift = _shift(a.top, top, scale)
    rescale = tl.exp2(shift)
    total_a = a.total * rescale
    mean_x_a = a.mean_x + shift
    total = tl.sum(total_a, 1, keep_dims=True)
    share = total_a / tl.where(total == 0.0, 1.0, total)
    mean_x = tl.sum(share * mean_x_a, 1, keep_dims=True)
    zero = tl.zeros_like(mean_x)
    base_d, mean_d, c_xd, c_dd = zero, zero, zero, zero
    base_e, mean_e, c_xe, c_xdd = zero, zero, zero, zero
    if ORDER >= 1:
        base_d = tl.sum(share * a.base_d, 1, keep_dims=True)
        mean_d_a = a.mean_d + (a.base_d - base_d)
        mean_d = tl.sum(share * mean_d_a, 1, keep_dims=True)
        apart_x = mean_x_a - mean_x
        apart_d = mean_d_a - mean_d
        between = total_a * apart_x
        c_xd_a = a.c_xd * rescale
        c_xd = tl.sum(c_xd_a + between * apart_d, 1, keep_dims=True)
        c_dd_a = a.c_dd * rescale
        c_dd = tl.sum(c_dd_a + total_a * apart_d * apart_d, 1, keep_dims=True)
        if ORDER == 2:
            base_e = tl.sum(share * a.base_e, 1, keep_dims=True)
            mean_e_a = a.mean_e + (a.base_e - base_e)
            mean_e = tl.sum(share * mean_e_a, 1, keep_dims=True)
            c_xe = tl.sum(a.c_xe * rescale + between * (mean_e_a - mean_e), 1, keep_dims=True)
            c_xdd = tl.sum(
                a.c_xdd * rescale + 2.0 * apart_d * c_xd_a + apart_x * c_dd_a + between * apart_d * apart_d,
                1,
                keep_dims=True,
            )
    return State(top, total, mean_x, base_d, mean_d, c_xd, c_dd, base_e, mean_e, c_xe, c_xdd)


@triton.jit
def _shift(old_top, top, scale):
    """What x changes by as the maximum goes from old_top to top; finite, so that 0 · shift is 0."""
    return tl.where(old_top == top, 0.0, tl.maximum((old_top - top) * (scale * BITS), -1e4))


@triton.jit
def stats_of_state(state, u_target, d_target, e_target, scale, ORDER: tl.constexpr):
    """logp, entropy, dlogp, dentropy, fisher, d2logp, d2entropy of a row; NaN for a row without logits."""
    total = tl.where(state.total == 0.0, float("nan"), state.total)
    nothing = 0.0 * total  # 0, NaN where there are no logits
    log_total = tl.log(total)
    logp = (u_target - state.top) * scale - log_total
    entropy = log_total - state.mean_x * NATS
    dlogp, dentropy, fisher, d2logp, d2entropy = nothing, nothing, nothing, nothing, nothing
    if ORDER >= 1:
        dlogp = (d_target - state.base_d - state.mean_d) * scale + nothing
        dentropy = -state.c_xd / total * (scale * NATS)
        variance = tl.where(state.c_dd < 0.0, 0.0, state.c_dd)  # below 0 by rounding alone, where all d are equal
        fisher = variance / total * scale * scale
        if ORDER == 2:
            d2logp = (e_target - state.base_e - state.mean_e) * scale - fisher
            d2entropy = -(fisher + (state.c_xe + state.c_xdd * scale) / total * (scale * NATS))
    return logp, entropy, dlogp, dentropy, fisher, d2logp, d2entropy


@triton.constexpr_function
def n_stats(order):
    """How many of the statistics an order has."""
    return (2, 5, 7)[order]


@triton.jit
def store_state(Place, stride, state, mask, ORDER: tl.constexpr):
    """The parts that ORDER has go to Place, Place + stride, Place + 2 · stride, ..."""
    for part in tl.static_range(n_parts(ORDER)):
        tl.store(Place + part * stride, state[part], mask=mask)


@triton.jit
def load_state(Place, stride, mask, ORDER: tl.constexpr):
    """What `store_state` left there; the empty state where `mask` is false."""
    top = tl.load(Place, mask=mask, other=float("-inf"))
    total, mean_x = _part(Place, 1, stride, mask), _part(Place, 2, stride, mask)
    zero = tl.zeros_like(top)
    base_d, mean_d, c_xd, c_dd = zero, zero, zero, zero
    base_e, mean_e, c_xe, c_xdd = zero, zero, zero, zero
    if ORDER >= 1:
        base_d, mean_d = _part(Place, 3, stride, mask), _part(Place, 4, stride, mask)
        c_xd, c_dd = _part(Place, 5, stride, mask), _part(Place, 6, stride, mask)
    if ORDER == 2:
        base_e, mean_e = _part(Place, 7, stride, mask), _part(Place, 8, stride, mask)
        c_xe, c_xdd = _part(Place, 9, stride, mask), _part(Place, 10, stride, mask)
    return State(top, total, mean_x, base_d, mean_d, c_xd, c_dd, base_e, mean_e, c_xe, c_xdd)


@triton.jit
def _part(Place, number: tl.constexpr, stride, mask):
    return tl.load(Place + number * stride, mask=mask, other=0.0)


@triton.constexpr_function
def n_parts(order):
    """How many parts of the state an order has."""
    return (3, 7, 11)[order]
