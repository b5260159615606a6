"""The online softmax with first-order moments: the state of a segment of a vocabulary, and how two merge.

Logits are z = scale · u and their derivatives ż = scale · d. With weights e = exp(z − max z) the state is

    top      max u, −inf for a segment without logits
    total    Σ e
    mean_x   Σ e x / Σ e,  x = z − max z ≤ 0
    mean_d   Σ e d / Σ e
    moment   Σ e (x − mean_x)(d − mean_d): centred, so nothing cancels when it becomes −Cov(z, ż)

Two states merge into that of both segments (Chan, Golub and LeVeque's update of centred moments), in any
order and grouping up to rounding: tiles of a loop, splits of a vocabulary and shards of it all use `merge`.
The functions take and return tensors of any shape: tiles are reduced along AXIS, which stays with size 1.

A logit of −inf is outside the vocabulary: it has weight 0 and its derivative, whatever it is, is never looked
at. So is one that a scale above 1 takes there.
"""

import triton
import triton.language as tl


@triton.jit
def empty_state(TEMPLATE):
    """The state of a segment without logits, one for each element of TEMPLATE."""
    zero = tl.zeros_like(TEMPLATE)
    return zero - float("inf"), zero, zero, zero, zero


@triton.jit
def tile_state(u, d, scale, AXIS: tl.constexpr, FIRST_ORDER: tl.constexpr):
    """The state of a tile of logits u and derivatives d (float32), over AXIS."""
    top = tl.max(u, AXIS, keep_dims=True)
    # Without the guard an empty tile would give −inf − (−inf) = NaN.
    x = (u - tl.where(top == float("-inf"), 0.0, top)) * scale
    masked = x == float("-inf")
    weight = tl.exp(x)
    x = tl.where(masked, 0.0, x)
    total = tl.sum(weight, AXIS, keep_dims=True)
    divisor = tl.where(total == 0.0, 1.0, total)
    mean_x = tl.sum(weight * x, AXIS, keep_dims=True) / divisor
    mean_d = tl.zeros_like(mean_x)
    moment = tl.zeros_like(mean_x)
    if FIRST_ORDER:
        d = tl.where(masked, 0.0, d)
        mean_d = tl.sum(weight * d, AXIS, keep_dims=True) / divisor
        moment = tl.sum(weight * (x - mean_x) * (d - mean_d), AXIS, keep_dims=True)
    return top, total, mean_x, mean_d, moment


@triton.jit
def merge(top_a, total_a, mean_x_a, mean_d_a, moment_a, top_b, total_b, mean_x_b, mean_d_b, moment_b, scale):
    """The state of two segments together."""
    top = tl.maximum(top_a, top_b)
    shift_a = _shift(top_a, top, scale)
    shift_b = _shift(top_b, top, scale)
    rescale_a = tl.exp(shift_a)
    rescale_b = tl.exp(shift_b)
    total_a = total_a * rescale_a
    total_b = total_b * rescale_b
    total = total_a + total_b
    divisor = tl.where(total == 0.0, 1.0, total)
    mean_x_a += shift_a
    mean_x_b += shift_b
    # Weighted sums rather than mean_a + share · (mean_b − mean_a): that would round at the size of a mean
    # whose weight is nothing.
    mean_x = (total_a * mean_x_a + total_b * mean_x_b) / divisor
    mean_d = (total_a * mean_d_a + total_b * mean_d_b) / divisor
    between = total_a * (total_b / divisor) * (mean_x_b - mean_x_a) * (mean_d_b - mean_d_a)
    return top, total, mean_x, mean_d, moment_a * rescale_a + moment_b * rescale_b + between


@triton.jit
def _shift(old_top, top, scale):
    """What z − max z changes by as the maximum goes from old_top to top; finite, so that 0 · shift is 0."""
    return tl.where(old_top == top, 0.0, tl.maximum((old_top - top) * scale, -1e4))


@triton.jit
def first_order_stats(u_target, d_target, top, total, mean_x, mean_d, moment, scale):
    """logp, entropy, dlogp, dentropy of a row from its state; NaN for a row without logits."""
    nothing = total == 0.0
    total = tl.where(nothing, float("nan"), total)
    log_total = tl.log(total)
    logp = (u_target - top) * scale - log_total
    entropy = log_total - mean_x
    dlogp = tl.where(nothing, float("nan"), (d_target - mean_d) * scale)
    return logp, entropy, dlogp, -moment / total * scale
