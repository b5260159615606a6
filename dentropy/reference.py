"""The reference: token statistics in plain PyTorch, on any device, in float32 or float64.

It is what the Triton kernels are tested against and what runs where they cannot (CPU, float64, second order).
All six quantities are softmax-weighted moments of the logits z and their derivatives ż and z̈. Rows are taken
a few at a time, so that the buffers stay in the processor's cache and each moment can have a pass of its own:
first the means, then the central moments of what is left, so that nothing cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dentropy.checks import check_linear, check_logits
from dentropy.sequence_sums import sequence_sums  # plain on every device, so public and reference are one
from dentropy.tables import TokenStats

__all__ = ["token_stats", "linear_token_stats", "sequence_sums"]

# Elements of one chunk buffer. On a CPU the three to five buffers of a chunk should stay in its caches;
# elsewhere a chunk must be large enough to be worth its kernel launches.
CPU_CHUNK = 2**19
DEVICE_CHUNK = 2**24
# Elements of one chunk of logits made from hidden states: enough rows to run the product at full speed.
LOGITS_CHUNK = 2**26
PRODUCT_BLOCK = 2**14


def token_stats(logits: Tensor, targets: Tensor, dlogits: Tensor | None = None,
                d2logits: Tensor | None = None, *, temperature: float = 1.0, softcap: float | None = None,
                validate: bool = False) -> TokenStats:
    """`dentropy.token_stats` in plain PyTorch; the same arguments, results and errors."""
    check_logits(logits, targets, dlogits, d2logits, temperature, softcap, validate)
    return stats_of_logits(logits, targets, dlogits, d2logits, temperature=temperature, softcap=softcap)


def linear_token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, dhidden: Tensor | None = None,
                       dweight: Tensor | None = None, *, bias: Tensor | None = None,
                       dbias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None,
                       validate: bool = False) -> TokenStats:
    """`dentropy.linear_token_stats` in plain PyTorch; the same arguments, results and errors."""
    check_linear(hidden, weight, targets, dhidden, dweight, bias, dbias, temperature, softcap, validate)
    return stats_of_hidden(stats_of_logits, hidden, weight, targets, dhidden, dweight, bias, dbias,
                           temperature=temperature, softcap=softcap)


@torch.no_grad()
def stats_of_logits(logits: Tensor, targets: Tensor, dlogits: Tensor | None = None,
                    d2logits: Tensor | None = None, *, temperature: float,
                    softcap: float | None) -> TokenStats:
    """The body of `token_stats`, without its checks."""
    given = [tensor for tensor in (logits, dlogits, d2logits) if tensor is not None]
    dtype = working_dtype(*given)
    rows, vocabulary = logits.shape
    chunk = max(1, min(rows, (CPU_CHUNK if logits.is_cpu else DEVICE_CHUNK) // vocabulary))
    buffers = torch.empty(len(given) + 2, chunk, vocabulary, dtype=dtype, device=logits.device)
    out = torch.empty(2 * len(given), rows, dtype=dtype, device=logits.device)
    # Only unchecked targets can be out of range: their rows are read at a valid place, then made NaN.
    valid = (targets >= 0) & (targets < vocabulary)
    columns = targets.long().clamp(0, vocabulary - 1).unsqueeze(1)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        views = buffers[:, :part.stop - start]
        for view, tensor in zip(views, given):
            view.copy_(tensor[part])
        moments = _chunk_stats(*views[:len(given)], scratch=views[len(given):], columns=columns[part],
                               temperature=temperature, softcap=softcap)
        for row, moment in zip(out, moments):
            row[part] = moment
    return TokenStats(*out.masked_fill_(~valid, math.nan))


def _chunk_stats(u: Tensor, du: Tensor | None = None, ddu: Tensor | None = None, *, scratch: Tensor,
                 columns: Tensor, temperature: float, softcap: float | None) -> list[Tensor]:
    """The fields of TokenStats [n] for n rows of logits and tangents [n, V], all of which are overwritten.

    Works in units in which z = scale · u, so that temperature and softcap cost no pass of their own. Only u
    minus its maximum is ever scaled: that keeps it at or below 0, and with it logp, whatever the rounding.
    """
    weight, product = scratch
    tangents = [tangent for tangent in (du, ddu) if tangent is not None]
    if softcap is not None:
        _apply_softcap(u, du, ddu, softcap, weight)
    scale = (softcap or 1.0) / temperature
    at_target = [tensor.gather(1, columns) for tensor in (u, *tangents)]
    top = u.amax(1, keepdim=True)
    x_target = (at_target[0] - top) * scale
    u.sub_(top).mul_(scale / math.log(2))  # PyTorch's exp2 is several times faster than its exp on a CPU
    # Boolean passes cost as much as exponentials on a CPU, so they run only where a −inf is there; on other
    # devices asking would synchronize.
    masked = torch.isneginf(u) if not u.is_cpu or u.amin(1).isneginf().any() else None
    torch.exp2(u, out=weight)
    if masked is not None:
        for tensor in (u, *tangents):
            tensor.masked_fill_(masked, 0.0)
    total = weight.sum(1, keepdim=True)

    def mean(first: Tensor, *others: Tensor) -> Tensor:
        torch.mul(weight, first, out=product)
        for factor in others:
            product.mul_(factor)
        return product.sum(1, keepdim=True).div_(total)

    mean_u, log_total = mean(u), total.log()
    out = [x_target - log_total, log_total - mean_u * math.log(2)]
    u.sub_(mean_u).mul_(math.log(2))  # from here on z − E z
    for tangent, value in zip(tangents, at_target[1:]):
        centre = mean(tangent)
        tangent.sub_(centre)
        # The second mean is what rounding left of a first one that is large beside the spread of ż.
        value.sub_(centre).sub_(mean(tangent))
    if du is not None:
        out += [scale * at_target[1], -scale * mean(du, u)]
    if ddu is not None:
        variance = scale**2 * mean(du, du)
        out += [scale * at_target[2] - variance,
                -(variance + scale * mean(ddu, u) + scale**2 * mean(du, du, u))]
    return [value.squeeze(1) for value in out]


def _apply_softcap(u: Tensor, du: Tensor | None, ddu: Tensor | None, softcap: float, scratch: Tensor) -> None:
    """In place: raw logits to t = tanh(raw / softcap), and their tangents to those of t."""
    masked = torch.isneginf(u)
    u.div_(softcap).tanh_()
    if ddu is not None:
        torch.mul(u, du, out=scratch)
        ddu.addcmul_(scratch, du, value=-2.0 / softcap)
    if du is not None:
        slope = torch.mul(u, u, out=scratch).neg_().add_(1.0).div_(softcap)
        for tangent in (du, ddu):
            if tangent is not None:
                tangent.mul_(slope)
    u.masked_fill_(masked, -math.inf)  # a token outside the vocabulary stays there


@torch.no_grad()
def stats_of_hidden(stats: Callable[..., TokenStats], hidden: Tensor, weight: Tensor, targets: Tensor,
                    dhidden: Tensor | None, dweight: Tensor | None, bias: Tensor | None, dbias: Tensor | None,
                    *, temperature: float, softcap: float | None) -> TokenStats:
    """The body of `linear_token_stats`: makes the logits of a few rows at a time and hands them to `stats`.

    `stats` has the signature of `stats_of_logits`.
    """
    factors = (hidden, weight, dhidden, dweight)
    dtype = working_dtype(*factors, bias, dbias)
    if dtype == torch.float64 or not _products_in_float32(*factors):
        hidden, weight, dhidden, dweight = (t if t is None else t.to(dtype) for t in factors)
    rows, vocabulary = len(hidden), len(weight)
    chunk = max(1, min(rows, LOGITS_CHUNK // vocabulary))
    moving = any(tensor is not None for tensor in (dhidden, dweight, dbias))
    buffers = torch.empty(1 + moving, chunk, vocabulary, dtype=dtype, device=hidden.device)
    parts = []
    for start in range(0, max(rows, 1), chunk):  # no rows at all still make one, empty, part
        part = slice(start, min(start + chunk, rows))
        logits, *tangent = buffers[:, :part.stop - start]
        _write_products(logits, bias, (hidden[part], weight))
        if moving:
            moved = None if dhidden is None else dhidden[part]
            _write_products(tangent[0], dbias, (moved, weight), (hidden[part], dweight))
        parts.append(stats(logits, targets[part], *tangent, temperature=temperature, softcap=softcap))
    return TokenStats(*(None if field[0] is None else torch.cat(field) for field in zip(*parts)))


def _write_products(out: Tensor, bias: Tensor | None, *products: tuple[Tensor | None, Tensor | None]) -> None:
    """out [n, V] = bias + the sum of a bᵀ over the pairs a [n, D], b [V, D] without a None."""
    out.zero_() if bias is None else out.copy_(bias)
    for a, b in products:
        if a is None or b is None:
            continue
        if a.dtype == out.dtype:
            out.addmm_(a, b.T)
        else:  # in blocks of the vocabulary, because this form of the product cannot accumulate in place
            for start in range(0, len(b), PRODUCT_BLOCK):
                block = slice(start, start + PRODUCT_BLOCK)
                out[:, block].add_(torch.mm(a, b[block].T, out_dtype=out.dtype))


def _products_in_float32(*factors: Tensor | None) -> bool:
    """Whether torch.mm multiplies these into float32: half precision of one dtype on CUDA."""
    present = [factor for factor in factors if factor is not None]
    dtypes = {factor.dtype for factor in present}
    return present[0].is_cuda and len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any of the tensors is, float32 otherwise."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return torch.float64 if torch.float64 in dtypes else torch.float32
