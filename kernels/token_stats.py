"""Token statistics from logits: one program per row, one pass over the vocabulary.

A row's tiles go through the online softmax of `moments` one after the other. The tiles depend on V alone, so
a row's bits do not depend on the rows around it. Softcap and temperature need no pass of their own: the
program works on u = logits, or u = tanh(logits / softcap), and z = scale · u with scale = 1 / temperature or
softcap / temperature.
"""

import torch
import triton
import triton.language as tl

from .moments import empty_state, first_order_stats, merge, tile_state

BLOCK = 4096  # logits in a tile
NUM_WARPS = 4


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["Targets", "Out"])
def _token_stats_kernel(
    Logits,  # [N, V], any floating dtype
    DLogits,  # [N, V], any floating dtype; not read unless FIRST_ORDER
    Targets,  # [N] int32 or int64
    Out,  # [2 or 4, N] float32: logp, entropy and, with FIRST_ORDER, dlogp, dentropy
    N, V, logits_row, logits_column, dlogits_row, dlogits_column, targets_stride,  # strides in elements
    scale, inverse_cap,  # float32; inverse_cap = 1 / softcap, not read unless SOFTCAP
    FIRST_ORDER: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    Logits += row * logits_row
    DLogits += row * dlogits_row
    one = tl.arange(0, 1)  # the states of a row are tensors of one element
    target = tl.load(Targets + row * targets_stride + one).to(tl.int64)
    valid = (target >= 0) & (target < V)  # nothing is read at an invalid target, and its row becomes NaN
    u_target, d_target = _load(Logits, DLogits, target, valid, logits_column, dlogits_column, inverse_cap,
                               FIRST_ORDER, SOFTCAP)

    # ż is taken relative to its mean over the first tile, or where that is all masked to ż at the target: a
    # part common to the whole row then costs no digits.
    columns = tl.arange(0, BLOCK).to(tl.int64)
    u, d = _load(Logits, DLogits, columns, columns < V, logits_column, dlogits_column, inverse_cap,
                 FIRST_ORDER, SOFTCAP)
    _, first_total, _, reference, _ = tile_state(u, d, scale, 0, FIRST_ORDER)
    otherwise = tl.where(u_target == float("-inf"), 0.0, d_target)
    reference = tl.where(first_total == 0.0, otherwise, reference)

    top, total, mean_x, mean_d, moment = empty_state(u_target)
    for start in range(0, V, BLOCK):
        u, d = _load(Logits, DLogits, start + columns, start + columns < V, logits_column, dlogits_column,
                     inverse_cap, FIRST_ORDER, SOFTCAP)
        top_b, total_b, mean_x_b, mean_d_b, moment_b = tile_state(u, d - reference, scale, 0, FIRST_ORDER)
        top, total, mean_x, mean_d, moment = merge(top, total, mean_x, mean_d, moment,
                                                   top_b, total_b, mean_x_b, mean_d_b, moment_b, scale)

    logp, entropy, dlogp, dentropy = first_order_stats(u_target, d_target - reference, top, total, mean_x,
                                                       mean_d, moment, scale)
    place = Out + row + one
    nan = float("nan")
    tl.store(place, tl.where(valid, logp, nan))
    tl.store(place + N.to(tl.int64), tl.where(valid, entropy, nan))
    if FIRST_ORDER:
        tl.store(place + 2 * N.to(tl.int64), tl.where(valid, dlogp, nan))
        tl.store(place + 3 * N.to(tl.int64), tl.where(valid, dentropy, nan))


@triton.jit
def _load(Logits, DLogits, columns, mask, logits_column, dlogits_column, inverse_cap,
          FIRST_ORDER: tl.constexpr, SOFTCAP: tl.constexpr):
    """u and its derivative at `columns` of a row; −inf and 0 where `mask` is false."""
    u = tl.load(Logits + columns * logits_column, mask=mask, other=float("-inf")).to(tl.float32)
    d = tl.zeros_like(u)
    if FIRST_ORDER:
        d = tl.load(DLogits + columns * dlogits_column, mask=mask, other=0.0).to(tl.float32)
    if SOFTCAP:
        t = _tanh(u * inverse_cap)
        d = d * (1.0 - t * t) * inverse_cap
        u = tl.where(u == float("-inf"), u, t)  # a masked logit stays masked
    return u, d


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


def token_stats(logits: torch.Tensor, targets: torch.Tensor, dlogits: torch.Tensor | None = None, *,
                temperature: float = 1.0, softcap: float | None = None) -> tuple[torch.Tensor, ...]:
    """logp and entropy, and with `dlogits` also dlogp and dentropy: float32 tensors [N].

    logits and dlogits are [N, V] in float16, bfloat16 or float32 with any strides, targets [N] int32 or
    int64, all on one device. Nothing is checked and nothing synchronizes; a target outside [0, V) makes its
    row NaN.
    """
    N, V = logits.shape
    out = torch.empty(2 if dlogits is None else 4, N, dtype=torch.float32, device=logits.device)
    if N == 0:
        return tuple(out)
    tangent = logits if dlogits is None else dlogits
    with torch.cuda.device_of(logits):
        _token_stats_kernel[(N,)](
            logits, tangent, targets, out, N, V, *logits.stride(), *tangent.stride(), targets.stride(0),
            (softcap or 1.0) / temperature, 1.0 / (softcap or 1.0),
            FIRST_ORDER=dlogits is not None, SOFTCAP=softcap is not None,
            BLOCK=min(BLOCK, max(128, triton.next_power_of_2(V))), num_warps=NUM_WARPS)
    return tuple(out)
