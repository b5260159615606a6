"""Soft capping of logits, z = c · tanh(l / c), with first and second derivatives; shared by both stats kernels."""

import triton
import triton.language as tl


@triton.jit
def softcapped(u, d, e, inverse_cap):
    """u = tanh(l / c) and its derivatives, from l and its derivatives; a logit of −inf stays −inf."""
    t = _tanh(u * inverse_cap)
    d *= inverse_cap
    e *= inverse_cap
    slope = (1.0 - t) * (1.0 + t)
    return tl.where(u == float("-inf"), u, t), slope * d, slope * (e - 2.0 * t * d * d)


@triton.jit
def _tanh(a):
    """tanh to 2 units of its own last place: a polynomial (least-maximum fit) up to 0.8, then exp."""
    w = a * a
    p = 0.0015847289
    p = p * w - 0.00740950985
    p = p * w + 0.0213029605
    p = p * w - 0.0538523228
    p = p * w + 0.133322209
    p = p * w - 0.333332974
    q = tl.exp(-2.0 * tl.abs(a))
    large = 1.0 - 2.0 * q / (1.0 + q)
    return tl.where(w < 0.64, a + a * (w * p), tl.where(a < 0.0, -large, large))
