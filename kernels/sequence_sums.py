"""Per-sequence sums of packed per-token values: one program per sequence, one pass over its tokens.

A sequence is walked in blocks from its last token to its first, so that what is left after a token, in
entropy and in tokens, is known when the token is met. Blocks are counted from the sequence's own end, and
each is summed in the same tree: a sequence's bits do not depend on the sequences around it.

Everything is float64. The sums of the blocks are added with compensation (Kahan), so that the rounding errors
of a sum are a few units in the last place of the sum of its terms' sizes, however long the sequence is.
"""

import torch
import triton
import triton.language as tl

from .configurations import options

# Tokens in a block, and the warps that share it; the same for every sequence, or bits would depend on the
# batch. One warp adds up a block by shuffles alone, without shared memory or barriers, and leaves room for
# many short sequences on a multiprocessor at once. Eight tokens a lane put many loads in flight without
# spilling (sm_90: 186 of 255 registers at second order). They keep the dependent steps of a long
# sequence few (391 at 100,000 tokens) and cost a short one only additions of zeros, no memory traffic.
BLOCK = 256
NUM_WARPS = 1

COLUMNS = (
    "n_tokens",
    "logp",
    "entropy",
    "dlogp",
    "dentropy",
    "entropy_dlogp",
    "entropy_to_go",
    "length_to_go",
    "d2logp",
    "d2entropy",
    "dentropy_to_go",
    "entropy_to_go_2",
    "length_to_go_2",
    "fisher",
)
COLUMNS_OF_ORDER = (3, 8, 13)  # without fisher, which comes after those of the order

_STRIDES = [
    "logp_stride",
    "entropy_stride",
    "dlogp_stride",
    "dentropy_stride",
    "d2logp_stride",
    "d2entropy_stride",
    "fisher_stride",
    "ends_stride",
]
_POINTERS = ["Logp", "Entropy", "DLogp", "DEntropy", "D2Logp", "D2Entropy", "Fisher", "Ends", "Out"]


# Fields are often rows of one tensor, whose alignment changes with the number of tokens, as does everything
# else here that a kernel could be specialized on.
@triton.jit(do_not_specialize=["S", *_STRIDES], do_not_specialize_on_alignment=_POINTERS)
def _sequence_sums_kernel(
    Logp,
    Entropy,  # [N], any floating dtype
    DLogp,
    DEntropy,
    D2Logp,
    D2Entropy,  # the same, or None below their order
    Fisher,  # the same, or None
    Ends,  # [S + 1] int32 or int64, the cu_seqlens
    Out,  # [columns, S] float64
    S,
    logp_stride,
    entropy_stride,
    dlogp_stride,
    dentropy_stride,
    d2logp_stride,
    d2entropy_stride,
    fisher_stride,
    ends_stride,  # strides in elements; not in tuples with their pointers, for those are always specialized
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(Ends + sequence * ends_stride).to(tl.int64)
    end = tl.load(Ends + (sequence + 1) * ends_stride).to(tl.int64)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    nothing = tl.full((), 0.0, tl.float64)
    zero = (nothing, nothing)
    logp, entropy, dlogp, dentropy, entropy_dlogp = zero, zero, zero, zero, zero
    entropy_to_go, length_to_go, d2logp, d2entropy = zero, zero, zero, zero
    dentropy_to_go, entropy_to_go_2, length_to_go_2, fisher = zero, zero, zero, zero

    for first in range(0, end - start, BLOCK):
        after = first + lanes  # tokens after this one
        token = end - 1 - after
        inside = token >= start
        h = _load(Entropy, token, entropy_stride, inside)
        logp = _add(logp, _load(Logp, token, logp_stride, inside))
        if DLogp is not None:
            d = _load(DLogp, token, dlogp_stride, inside)
            # What is left behind the block, and of the block behind the token. The latter is read anew, one token
            # on: a running sum that includes a token's own value, less that one, would round at its size.
            later = inside & (lanes > 0)
            left_h = _left(entropy, _load(Entropy, token + 1, entropy_stride, later))
            left_n = after.to(tl.float64)
            if D2Logp is not None:
                dd = _load(D2Logp, token, d2logp_stride, inside)
                left_dh = _left(dentropy, _load(DEntropy, token + 1, dentropy_stride, later))
                dentropy_to_go = _add(dentropy_to_go, left_dh * d)
                entropy_to_go_2 = _add(entropy_to_go_2, _second_order(d, dd, left_h, entropy_to_go))
                length_to_go_2 = _add(length_to_go_2, _second_order(d, dd, left_n, length_to_go))
                d2logp = _add(d2logp, dd)
                d2entropy = _add(d2entropy, _load(D2Entropy, token, d2entropy_stride, inside))
            entropy_to_go = _add(entropy_to_go, left_h * d)
            length_to_go = _add(length_to_go, left_n * d)
            entropy_dlogp = _add(entropy_dlogp, h * d)
            dentropy = _add(dentropy, _load(DEntropy, token, dentropy_stride, inside))
            dlogp = _add(dlogp, d)
            if Fisher is not None:
                fisher = _add(fisher, _load(Fisher, token, fisher_stride, inside))
        entropy = _add(entropy, h)

    Out += sequence
    S = S.to(tl.int64)
    tl.store(Out, (end - start).to(tl.float64))
    tl.store(Out + S, logp[0])
    tl.store(Out + 2 * S, entropy[0])
    if DLogp is not None:
        tl.store(Out + 3 * S, dlogp[0])
        tl.store(Out + 4 * S, dentropy[0])
        tl.store(Out + 5 * S, entropy_dlogp[0])
        tl.store(Out + 6 * S, entropy_to_go[0])
        tl.store(Out + 7 * S, length_to_go[0])
    if D2Logp is not None:
        tl.store(Out + 8 * S, d2logp[0])
        tl.store(Out + 9 * S, d2entropy[0])
        tl.store(Out + 10 * S, dentropy_to_go[0])
        tl.store(Out + 11 * S, entropy_to_go_2[0])
        tl.store(Out + 12 * S, length_to_go_2[0])
    if Fisher is not None:
        tl.store(Out + (8 if D2Logp is None else 13) * S, fisher[0])


@triton.jit
def _load(Values, token, stride, mask):
    """Values at `token` in float64; 0 where `mask` is false."""
    return tl.load(Values + token * stride, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _left(total, later):
    """`total` and the running sum of `later` over the block: what is left behind each token."""
    return total[0] + (tl.cumsum(later, 0) - total[1])


@triton.jit
def _second_order(d, dd, left, to_go):
    """What each token adds to Σ_j x_j (A_j² + Σ_{k<j} d2logp_k), A_j = Σ_{k<j} dlogp_k.

    That is Σ_k [d2logp_k left_k + dlogp_k (dlogp_k left_k + 2 Σ_{l>k} dlogp_l left_l)] with left_k = Σ_{j>k} x_j;
    `to_go` is Σ_l dlogp_l left_l behind the block. The token's own term, taken off a running sum that includes it,
    is no larger than what is added.
    """
    own = d * left
    return dd * left + d * (2 * _left(to_go, own) - own)


@triton.jit
def _add(total, values):
    """`total` and the sum of a block's values: a pair of the sum and what roundings added to it (Kahan)."""
    value = tl.sum(values) - total[1]
    rounded = total[0] + value
    return rounded, (rounded - total[0]) - value


def columns_of(logp, entropy, dlogp=None, dentropy=None, d2logp=None, d2entropy=None, fisher=None) -> tuple[str, ...]:
    """The names of the columns that `sequence_sums` makes of these values, in order."""
    order = (dlogp is not None) + (d2logp is not None)
    return COLUMNS[: COLUMNS_OF_ORDER[order]] + (() if fisher is None else COLUMNS[-1:])


def sequence_sums(
    logp: torch.Tensor,
    entropy: torch.Tensor,
    dlogp: torch.Tensor | None = None,
    dentropy: torch.Tensor | None = None,
    d2logp: torch.Tensor | None = None,
    d2entropy: torch.Tensor | None = None,
    fisher: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """The columns that `columns_of` names, for values up to order 0, 1 or 2: float64 [columns, S].

    The values are [N] in any floating dtypes, each order whole or None, fisher from order 1 on or None, cu_seqlens
    [S + 1] in int32 or int64, all with any strides and on one device. Nothing is checked and nothing synchronizes.
    """
    values = (logp, entropy, dlogp, dentropy, d2logp, d2entropy, fisher)
    sequences = len(cu_seqlens) - 1
    out = torch.empty(len(columns_of(*values)), sequences, dtype=torch.float64, device=logp.device)
    if sequences == 0:
        return out
    with torch.cuda.device_of(logp):
        _sequence_sums_kernel[(sequences,)](
            *values,
            cu_seqlens,
            out,
            sequences,
            *(None if value is None else value.stride(0) for value in values),
            cu_seqlens.stride(0),
            BLOCK=BLOCK,
            **options(NUM_WARPS),
        )
    return out
