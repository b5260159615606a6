"""The online softmax with moments up to second order: the state of a segment of a vocabulary, and how two merge.

Logits are z = scale · u with derivatives ż = scale · d and z̈ = scale · e. With x = (z − max z) / ln 2 ≤ 0, in
bits, and weights w = 2^x the state is a tuple, of which order 0 has the first 3 parts, order 1 the first 6 and
order 2 all:

    0 top      max u, −inf for a segment without logits      6 base_e   as base_d, for e
    1 total    Σ w                                           7 mean_e   Σ w e / Σ w − base_e
    2 mean_x   Σ w x / Σ w                                   8 c_dd     Σ w (d − E d)²
    3 base_d   about the mean of d                           9 c_xe     Σ w (x − E x)(e − E e)
    4 mean_d   Σ w d / Σ w − base_d                         10 c_xdd    Σ w (x − E x)(d − E d)²
    5 c_xd     Σ w (x − E x)(d − E d)

(the parts of higher orders are there and 0). Moments are centred, so nothing cancels when they become
covariances, and a mean is kept in two parts, so that a part common to the derivatives of a whole row costs
no digits. Two states merge into that of both segments (Chan, Golub and LeVeque's update of centred moments),
in any order and grouping up to rounding: tiles of a loop, splits of a vocabulary and shards of it all use
`merge`, and `merge_lanes` merges many at once.

A logit of −inf is outside the vocabulary: it has weight 0 and its derivatives, whatever they are, are never
looked at. So is one that a scale above 1 takes there.
"""

import triton
import triton.language as tl

# Bits, because 2^x is one instruction and eˣ is three.
BITS = tl.constexpr(1.4426950408889634)  # of a nat
NATS = tl.constexpr(0.6931471805599453)  # of a bit


@triton.jit
def empty_state(TEMPLATE):
    """The state of a segment without logits, one for each element of TEMPLATE."""
    zero = tl.zeros_like(TEMPLATE)
    return zero - float("inf"), zero, zero, zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def tile_state(u, d, e, scale, ORDER: tl.constexpr, MASKED: tl.constexpr = True):
    """The states of a tile of logits u and derivatives d and e (float32), over the axes that `_sum` names.

    MASKED: a logit may be −inf; otherwise all of scale · u is finite, and what masks cost is left out.
    """
    top = _max(u)
    if MASKED:
        # Without the guard an empty tile would give −inf − (−inf) = NaN.
        x = (u - tl.where(top == float("-inf"), 0.0, top)) * (scale * BITS)
        masked = x == float("-inf")
        weight = tl.exp2(x)
        x = tl.maximum(x, -1e4)  # finite, so that 0 · x is 0
        d = tl.where(masked, 0.0, d)
        e = tl.where(masked, 0.0, e)
    else:
        x = (u - top) * (scale * BITS)
        weight = tl.exp2(x)
    total = _sum(weight)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    mean_x = _sum(weight * x) * share
    zero = tl.zeros_like(mean_x)
    base_d, mean_d, c_xd = zero, zero, zero
    base_e, mean_e, c_dd, c_xe, c_xdd = zero, zero, zero, zero, zero
    if ORDER >= 1:
        base_d = _sum(weight * d) * share
        x -= mean_x
        d -= base_d
        weighted_d = weight * d
        mean_d = _sum(weighted_d) * share  # what rounding left of the first mean
        c_xd = _sum(weighted_d * x)
        if ORDER == 2:
            base_e = _sum(weight * e) * share
            weighted_e = weight * (e - base_e)
            mean_e = _sum(weighted_e) * share
            c_xe = _sum(weighted_e * x)
            c_dd = _sum(weighted_d * d) - total * mean_d * mean_d
            c_xdd = _sum(weighted_d * d * x) - 2.0 * mean_d * c_xd
    return top, total, mean_x, base_d, mean_d, c_xd, base_e, mean_e, c_dd, c_xe, c_xdd


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
    top_a, total_a, mean_x_a, base_d, mean_d_a, c_xd_a, base_e, mean_e_a, c_dd_a, c_xe_a, c_xdd_a = a
    top_b, total_b, mean_x_b, base_d_b, mean_d_b, c_xd_b, base_e_b, mean_e_b, c_dd_b, c_xe_b, c_xdd_b = b
    top = tl.maximum(top_a, top_b)
    shift_a = _shift(top_a, top, scale)
    shift_b = _shift(top_b, top, scale)
    rescale_a = tl.exp2(shift_a)
    rescale_b = tl.exp2(shift_b)
    total_a *= rescale_a
    total_b *= rescale_b
    first = total_a == 0.0  # nothing of weight before b
    total = total_a + total_b
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    share_a = tl.where(total_b == 0.0, 1.0, total_a * share)
    share_b = tl.where(first, 1.0, total_b * share)
    mean_x_a += shift_a
    mean_x_b += shift_b
    # Weighted sums rather than mean_a + share_b · (mean_b − mean_a): that would round at the size of a mean
    # whose weight is nothing.
    mean_x = share_a * mean_x_a + share_b * mean_x_b
    zero = tl.zeros_like(mean_x)
    mean_d, c_xd, mean_e, c_dd, c_xe, c_xdd = zero, zero, zero, zero, zero, zero
    if ORDER >= 1:
        mean_d_b += base_d_b - tl.where(first, base_d_b, base_d)
        base_d = tl.where(first, base_d_b, base_d)
        mean_d = share_a * mean_d_a + share_b * mean_d_b
        apart_x = mean_x_b - mean_x_a
        apart_d = mean_d_b - mean_d_a
        between = total_a * share_b * apart_x
        c_xd_a *= rescale_a
        c_xd_b *= rescale_b
        c_xd = c_xd_a + c_xd_b + between * apart_d
        if ORDER == 2:
            mean_e_b += base_e_b - tl.where(first, base_e_b, base_e)
            base_e = tl.where(first, base_e_b, base_e)
            mean_e = share_a * mean_e_a + share_b * mean_e_b
            c_xe = c_xe_a * rescale_a + c_xe_b * rescale_b + between * (mean_e_b - mean_e_a)
            c_dd_a *= rescale_a
            c_dd_b *= rescale_b
            c_dd = c_dd_a + c_dd_b + total_a * share_b * apart_d * apart_d
            # Each segment's third moment about the common means; theirs are share · apart from its own.
            c_xdd = (
                c_xdd_a * rescale_a
                + c_xdd_b * rescale_b
                + 2.0 * apart_d * (share_a * c_xd_b - share_b * c_xd_a)
                + apart_x * (share_a * c_dd_b - share_b * c_dd_a)
                + between * (share_a - share_b) * apart_d * apart_d
            )
    return top, total, mean_x, base_d, mean_d, c_xd, base_e, mean_e, c_dd, c_xe, c_xdd


@triton.jit
def merge_lanes(state, scale, ORDER: tl.constexpr):
    """The state of all lanes together, [1, 1, 1], from states [1, lanes, 1]."""
    top_a, total_a, mean_x_a, base_d_a, mean_d_a, c_xd_a, base_e_a, mean_e_a, c_dd_a, c_xe_a, c_xdd_a = state
    top = tl.max(top_a, 1, keep_dims=True)
    shift = _shift(top_a, top, scale)
    rescale = tl.exp2(shift)
    total_a *= rescale
    mean_x_a += shift
    total = tl.sum(total_a, 1, keep_dims=True)
    share = total_a / tl.where(total == 0.0, 1.0, total)
    mean_x = tl.sum(share * mean_x_a, 1, keep_dims=True)
    zero = tl.zeros_like(mean_x)
    base_d, mean_d, c_xd = zero, zero, zero
    base_e, mean_e, c_dd, c_xe, c_xdd = zero, zero, zero, zero, zero
    if ORDER >= 1:
        base_d = tl.sum(share * base_d_a, 1, keep_dims=True)
        mean_d_a += base_d_a - base_d
        mean_d = tl.sum(share * mean_d_a, 1, keep_dims=True)
        apart_x = mean_x_a - mean_x
        apart_d = mean_d_a - mean_d
        between = total_a * apart_x
        c_xd_a *= rescale
        c_xd = tl.sum(c_xd_a + between * apart_d, 1, keep_dims=True)
        if ORDER == 2:
            base_e = tl.sum(share * base_e_a, 1, keep_dims=True)
            mean_e_a += base_e_a - base_e
            mean_e = tl.sum(share * mean_e_a, 1, keep_dims=True)
            c_xe = tl.sum(c_xe_a * rescale + between * (mean_e_a - mean_e), 1, keep_dims=True)
            c_dd_a *= rescale
            c_dd = tl.sum(c_dd_a + total_a * apart_d * apart_d, 1, keep_dims=True)
            c_xdd = tl.sum(
                c_xdd_a * rescale + 2.0 * apart_d * c_xd_a + apart_x * c_dd_a + between * apart_d * apart_d,
                1,
                keep_dims=True,
            )
    return top, total, mean_x, base_d, mean_d, c_xd, base_e, mean_e, c_dd, c_xe, c_xdd


@triton.jit
def _shift(old_top, top, scale):
    """What x changes by as the maximum goes from old_top to top; finite, so that 0 · shift is 0."""
    return tl.where(old_top == top, 0.0, tl.maximum((old_top - top) * (scale * BITS), -1e4))


@triton.jit
def stats_of_state(state, u_target, d_target, e_target, scale, ORDER: tl.constexpr):
    """logp, entropy, dlogp, dentropy, d2logp, d2entropy of a row; NaN for a row without logits."""
    top, total, mean_x, base_d, mean_d, c_xd, base_e, mean_e, c_dd, c_xe, c_xdd = state
    total = tl.where(total == 0.0, float("nan"), total)
    nothing = 0.0 * total  # 0, NaN where there are no logits
    log_total = tl.log(total)
    logp = (u_target - top) * scale - log_total
    entropy = log_total - mean_x * NATS
    dlogp, dentropy, d2logp, d2entropy = nothing, nothing, nothing, nothing
    if ORDER >= 1:
        dlogp = (d_target - base_d - mean_d) * scale + nothing
        dentropy = -c_xd / total * (scale * NATS)
        if ORDER == 2:
            variance = c_dd / total * scale * scale
            d2logp = (e_target - base_e - mean_e) * scale - variance
            d2entropy = -(variance + (c_xe + c_xdd * scale) / total * (scale * NATS))
    return logp, entropy, dlogp, dentropy, d2logp, d2entropy


@triton.jit
def store_state(Place, stride, state, mask, ORDER: tl.constexpr):
    """The parts that ORDER has go to Place, Place + stride, Place + 2 · stride, ..."""
    for part in tl.static_range(n_parts(ORDER)):
        tl.store(Place + part * stride, state[part], mask=mask)


@triton.jit
def load_state(Place, stride, mask, ORDER: tl.constexpr):
    """What `store_state` left there; 0 where `mask` is false."""
    top, total, mean_x = _load_three(Place, stride, mask)
    zero = tl.zeros_like(top)
    base_d, mean_d, c_xd = zero, zero, zero
    base_e, mean_e, c_dd, c_xe, c_xdd = zero, zero, zero, zero, zero
    if ORDER >= 1:
        base_d, mean_d, c_xd = _load_three(Place + 3 * stride, stride, mask)
    if ORDER == 2:
        base_e, mean_e, c_dd = _load_three(Place + 6 * stride, stride, mask)
        c_xe = tl.load(Place + 9 * stride, mask=mask, other=0.0)
        c_xdd = tl.load(Place + 10 * stride, mask=mask, other=0.0)
    return top, total, mean_x, base_d, mean_d, c_xd, base_e, mean_e, c_dd, c_xe, c_xdd


@triton.jit
def _load_three(Place, stride, mask):
    return (
        tl.load(Place, mask=mask, other=0.0),
        tl.load(Place + stride, mask=mask, other=0.0),
        tl.load(Place + 2 * stride, mask=mask, other=0.0),
    )


@triton.constexpr_function
def n_parts(order):
    """How many parts of the state an order has."""
    return (3, 6, 11)[order]
