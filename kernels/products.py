"""Matrix products that accumulate in float32, compiled and interpreted."""

import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 factors as integers; float32 holds their products exactly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b; float32 factors are rounded to TF32 only with PRECISION "tf32"."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
