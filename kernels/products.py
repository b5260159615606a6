"""Matrix products that accumulate in float32, compiled and interpreted."""

import torch
import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 factors as integers; float32 holds their products exactly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NVIDIA = tl.constexpr(torch.version.hip is None)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b; float32 factors are rounded to TF32 only with PRECISION "tf32"."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_apart(a, b, acc, PRECISION: tl.constexpr):
    """As `dot`, for one step of a long sum: float32 products of the step are summed before `acc` is added.

    Tensor cores truncate as they add, always towards zero, and a chain of 4,096 additions in order loses more digits
    than PyTorch's sums of sums, in "tf32x3" and on ordinary cores alike; chains of a step lose none that count.
    """
    if a.dtype == tl.float32:
        # The last argument is of no effect but one: the compiler does not pull `acc` into the product.
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])
    else:
        return dot(a, b, acc, PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 x in DTYPE, and the same again in float32."""
    if NVIDIA and not INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        # Two at a time: for values that are used twice the compiler converts each one alone.
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=r,=r,=r,r,r",
            [x],
            dtype=(tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        y = x.to(DTYPE)
        return y, y.to(tl.float32)
