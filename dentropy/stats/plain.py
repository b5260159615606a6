"""Token statistics in plain PyTorch, on any device: what runs on a CPU, in float64 and where Triton is not.

All quantities are softmax-weighted moments of the logits z and their derivatives ż and z̈. Rows are taken
a few at a time, so that the buffers stay in the processor's cache and each moment can have a pass of its own:
first the means, then the central moments of what is left, so that nothing cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dentropy.stats.checks import check_logits
from dentropy.stats.sequence_sums import plain_columns, table_of
from dentropy.stats.tables import SequenceSums, TokenStats, working_dtype
from dentropy.stats.vocabulary_parallel import checked_linear

# Elements of one chunk buffer. On a CPU the three to five buffers of a chunk should stay in its caches;
# elsewhere a chunk must be large enough to be worth its kernel launches.
CPU_CHUNK = 2**18
DEVICE_CHUNK = 2**24
# Elements of one chunk of logits made from hidden states: enough rows to run the product at full speed.
LOGITS_CHUNK = 2**25
PRODUCT_BLOCK = 2**14
LOG_2 = math.log(2)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    dlogits: Tensor | None = None,
    d2logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    validate: bool = False,
) -> TokenStats:
    """`dentropy.token_stats` in plain PyTorch; the same arguments, results and errors."""
    check_logits(logits, targets, dlogits, d2logits, temperature, softcap, validate)
    return stats_of_logits(logits, targets, dlogits, d2logits, temperature=temperature, softcap=softcap)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dhidden: Tensor | None = None,
    dweight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    process_group=None,
    validate: bool = False,
) -> TokenStats:
    """`dentropy.linear_token_stats` in plain PyTorch; the same arguments, results and errors."""
    targets, gather = checked_linear(
        hidden, weight, targets, dhidden, dweight, bias, dbias, temperature, softcap, process_group, validate
    )
    return stats_of_hidden(
        hidden, weight, targets, dhidden, dweight, bias, dbias, temperature=temperature, softcap=softcap, gather=gather
    )


def sequence_sums(stats: TokenStats, cu_seqlens, *, group=None) -> SequenceSums:
    """`dentropy.sequence_sums` in NumPy, whatever the device; the same arguments, results and errors."""
    return table_of(plain_columns, stats, cu_seqlens, group)


@torch.no_grad()
def stats_of_logits(
    logits: Tensor,
    targets: Tensor,
    dlogits: Tensor | None = None,
    d2logits: Tensor | None = None,
    *,
    temperature: float,
    softcap: float | None,
) -> TokenStats:
    """The body of `token_stats`, without its checks."""
    scale = _scale(temperature, softcap)
    state = _state_of_logits(logits, targets, dlogits, d2logits, scale=scale, softcap=softcap)
    return _stats_of_states(state.unsqueeze(0), scale)


def _scale(temperature: float, softcap: float | None) -> float:
    """z is this times u, where u is the raw logit or, with a softcap, tanh(raw / softcap)."""
    return (softcap or 1.0) / temperature


# Fields of the state of a vocabulary or of one of its shards, at orders 0, 1 and 2. With x = z − max z and masses eˣ:
# 1 where the target was found and u there, max u, Σ eˣ, E x; then u̇ at the target, E u̇ in two parts,
# Σ eˣ (x − E x)(u̇ − E u̇) and Σ eˣ (u̇ − E u̇)²; then d2logp and d2entropy themselves, because only whole
# vocabularies go to second order.
STATE_FIELDS = (5, 10, 12)


def _state_of_logits(
    logits: Tensor, targets: Tensor, *tangents: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """The state [fields, N] of a vocabulary, or of one of its shards, from whose first token the targets count."""
    given = [tensor for tensor in (logits, *tangents) if tensor is not None]
    dtype = working_dtype(*given)
    n_rows, vocabulary = logits.shape
    chunk = max(1, min(n_rows, (CPU_CHUNK if logits.is_cpu else DEVICE_CHUNK) // vocabulary))
    buffers = torch.empty(len(given) + 2, chunk, vocabulary, dtype=dtype, device=logits.device)
    moments = torch.empty(MOMENTS[len(given) - 1], n_rows, 1, dtype=dtype, device=logits.device)
    for start in range(0, n_rows, chunk):
        part = slice(start, min(start + chunk, n_rows))
        views = buffers[:, : part.stop - start]
        rows = [_readable(tensor[part], view, softcap) for tensor, view in zip(given, views)]
        if softcap is not None:
            _apply_softcap(*rows, softcap=softcap, scratch=views[-1])
        _write_moments(moments[:, part], *rows, buffers=views, scale=scale)
    # A target outside is read at a valid place, and not counted as found.
    found = ((targets >= 0) & (targets < vocabulary)).unsqueeze(1)
    columns = targets.long().clamp(0, vocabulary - 1).unsqueeze(1)
    at_target = [tensor.gather(1, columns).to(dtype) for tensor in given]
    if softcap is not None:
        _apply_softcap(*at_target, softcap=softcap, scratch=torch.empty_like(at_target[0]))
    return _state_of_moments(moments, found, at_target, scale).squeeze(2)


def _readable(rows: Tensor, buffer: Tensor, softcap: float | None) -> Tensor:
    """The rows as they are where they can be read again and again; a copy of what is converted, or capped in place."""
    as_they_are = rows.dtype == buffer.dtype and rows.stride(1) == 1 and softcap is None
    return rows if as_they_are else buffer.copy_(rows)


# What passes over the vocabulary give, at orders 0, 1 and 2. With x = (z − max z) / log 2 and masses 2ˣ: max u, Σ 2ˣ,
# E x; then E u̇ in two parts, Σ 2ˣ (x − E x) u̇' and Σ 2ˣ u̇'², where u̇' is u̇ minus the first part; then E ü in two parts,
# Σ 2ˣ (x − E x) ü' and Σ 2ˣ (x − E x) u̇'². A second part is what rounding left of a first one that is large beside the
# spread; `_state_of_moments` takes it from the sums, which costs less than to take it from every u̇'.
MOMENTS = (3, 7, 11)


def _write_moments(out: Tensor, u: Tensor, *tangents: Tensor, buffers: Tensor, scale: float) -> None:
    """The moments [fields, n, 1] of n rows of logits and tangents [n, V]. `buffers` are overwritten: one for each of
    these, which may be its place, and two more.

    Works in units in which z = scale · u, so that temperature and softcap cost no pass of their own. Only u
    minus its maximum is ever scaled: that keeps it at or below 0, and with it logp, whatever the rounding.
    """
    x, *centred, mass, product = buffers
    top, total, mean_x, *of_tangents = out
    torch.amax(u, 1, keepdim=True, out=top)
    torch.sub(u, top, out=x).mul_(scale / LOG_2)  # PyTorch's exp2 is several times faster than its exp on a CPU
    torch.exp2(x, out=mass)

    def moment(factor: Tensor, out: Tensor) -> Tensor:
        """Σ mass · factor, whose terms stay in `product`."""
        return torch.sum(torch.mul(mass, factor, out=product), 1, keepdim=True, out=out)

    torch.sum(mass, 1, keepdim=True, out=total)
    moment(x, mean_x)
    # A logit of −inf makes this sum NaN, by 0 · −inf. Boolean passes cost as much as exponentials on a CPU, so they run
    # only then; on other devices asking would synchronize.
    if not x.is_cpu or mean_x.isnan().any():
        masked = torch.isneginf(x) | torch.isneginf(top)  # a row of −inf alone: −inf − (−inf) is NaN
        for tensor in (x, mass):
            tensor.masked_fill_(masked, 0.0)
        zero = x.new_zeros(())
        tangents = [torch.where(masked, zero, tensor, out=own) for tensor, own in zip(tangents, centred)]
        torch.sum(mass, 1, keepdim=True, out=total)
        moment(x, mean_x)
    inverse = total.masked_fill(total == 0.0, 1.0).reciprocal_()
    mean_x.mul_(inverse)
    if tangents:
        x.sub_(mean_x)

    def centre(tangent: Tensor, own: Tensor, base: Tensor, rest: Tensor) -> None:
        """own = tangent − its mean; `product` has mass · own."""
        moment(tangent, base).mul_(inverse)
        moment(torch.sub(tangent, base, out=own), rest).mul_(inverse)

    if len(tangents) == 2:
        *of_tangents, base, rest, cross, third = of_tangents
        centre(tangents[1], centred[1], base, rest)
        torch.sum(product.mul_(x), 1, keepdim=True, out=cross)
    if tangents:
        base, rest, covariance, spread = of_tangents
        du = centred[0]
        centre(tangents[0], du, base, rest)
        torch.sum(x.mul_(product), 1, keepdim=True, out=covariance)
        torch.sum(product.mul_(du), 1, keepdim=True, out=spread)
    if len(tangents) == 2:
        torch.sum(x.mul_(du), 1, keepdim=True, out=third)


def _state_of_moments(moments: Tensor, found: Tensor, at_target: list[Tensor], scale: float) -> Tensor:
    """[fields, N, 1], from `moments`; found [N, 1] says where `at_target`, u, u̇ and ü [N, 1], are to be believed."""
    top, total, mean_x, *of_tangents = moments
    u, *derivatives = (torch.where(found, value, 0.0) for value in at_target)
    state = [found.to(top.dtype), u, top, total, LOG_2 * mean_x]
    if derivatives:
        base, rest, covariance, spread, *of_second = of_tangents
        spread = (spread - total * rest.square()).clamp(min=0.0)
        state += [derivatives[0], base, rest, LOG_2 * covariance, spread]
    if len(derivatives) == 2:
        base, rest_of_second, cross, third = of_second
        third = third - 2.0 * rest * covariance
        everything = _everything(total, found)
        variance = scale**2 * spread / everything
        state += [
            scale * (derivatives[1] - base - rest_of_second) - variance,
            -(variance + scale * LOG_2 * (cross + scale * third) / everything),
        ]
    return torch.stack(state)


def _everything(total: Tensor, found: Tensor) -> Tensor:
    """The mass of a whole vocabulary; NaN, and with it the row, where it has no token or not the target."""
    return total.masked_fill((total == 0) | ~found, math.nan)


def _stats_of_states(states: Tensor, scale: float) -> TokenStats:
    """From the states of all shards of a vocabulary, [shards, fields, N], merged about their common means."""
    found, u_target, top, total, mean_x = states[:, : STATE_FIELDS[0]].unbind(1)
    highest = top.amax(0)
    shift = torch.where(top == highest, 0.0, ((top - highest) * scale).clamp(min=-1e4))  # finite: 0 · shift is 0
    rescale = shift.exp()
    total = total * rescale
    everything = _everything(total.sum(0), found.sum(0) == 1)
    share = total / everything
    x = mean_x + shift  # of each shard, from the highest logit of all
    mean_x = (share * x).sum(0)
    log_total = everything.log()
    values = (u_target.sum(0) - highest) * scale - log_total, log_total - mean_x
    first, second = {}, {}
    if states.shape[1] > STATE_FIELDS[0]:
        du_target, base, rest, within, spread = states[:, STATE_FIELDS[0] : STATE_FIELDS[1]].unbind(1)
        centre = (share * base).sum(0)
        apart = base - centre + rest
        covariance = (within * rescale / everything + share * (x - mean_x) * apart).sum(0)
        mean = (share * apart).sum(0)
        variance = (spread * rescale / everything + share * (apart - mean).square()).sum(0)
        first = dict(
            dlogp=scale * (du_target.sum(0) - centre - mean), dentropy=-scale * covariance, fisher=scale**2 * variance
        )
        second = dict(zip(("d2logp", "d2entropy"), states[0, STATE_FIELDS[1] :]))
    return TokenStats(*values, **first, **second)


def _apply_softcap(
    u: Tensor, du: Tensor | None = None, ddu: Tensor | None = None, *, softcap: float, scratch: Tensor
) -> None:
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
def stats_of_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    bias: Tensor | None,
    dbias: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> TokenStats:
    """The body of `linear_token_stats`: makes the logits of a few rows at a time.

    Where weight is one of several shards of the vocabulary, targets count from its first row and `gather` takes a
    tensor of this shard, [fields, N], to those of all shards in order, [shards, fields, N].
    """
    factors = (hidden, weight, dhidden, dweight)
    dtype = working_dtype(*factors, bias, dbias)
    if dtype == torch.float64 or not _products_in_float32(*factors):
        hidden, weight, dhidden, dweight = (t if t is None else t.to(dtype) for t in factors)
    n_rows, vocabulary = len(hidden), len(weight)
    scale = _scale(temperature, softcap)
    chunk = max(1, LOGITS_CHUNK // vocabulary)
    chunk = math.ceil(n_rows / max(1, math.ceil(n_rows / chunk)))  # as many chunks, of one size
    moving = any(tensor is not None for tensor in (dhidden, dweight, dbias))
    buffer = torch.empty((1 + moving) * chunk * vocabulary, dtype=dtype, device=hidden.device)
    parts = []
    for start in range(0, max(n_rows, 1), max(chunk, 1)):  # no rows at all still make one, empty, part
        part = slice(start, min(start + chunk, n_rows))
        rows = [tensor[part] for tensor in (hidden, dhidden) if tensor is not None]
        made = buffer[: (1 + moving) * len(rows[0]) * vocabulary].view(1 + moving, len(rows[0]), vocabulary)
        _write_product(made[: len(rows)].flatten(0, 1), torch.cat(rows), weight)  # at once: the weight is read once
        if dweight is not None:
            _write_product(made[1], hidden[part], dweight, add=dhidden is not None)
        elif moving and dhidden is None:
            made[1].zero_()
        for of_bias, logits in zip((bias, dbias), made):
            if of_bias is not None:
                logits.add_(of_bias)
        parts.append(_state_of_logits(made[0], targets[part], *made[1:], scale=scale, softcap=softcap))
    state = torch.cat(parts, 1)  # gathered whole: how many rows make a part depends on this shard's size
    return _stats_of_states(state.unsqueeze(0) if gather is None else gather(state), scale)


def _write_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out [n, V] = a bᵀ, for a [n, D] and b [V, D]; with `add` that is added to it."""
    if a.dtype == out.dtype:
        out.addmm_(a, b.T, beta=float(add))  # with beta = 0 what `out` held is not read
        return
    for start in range(0, len(b), PRODUCT_BLOCK):  # because this form of the product cannot accumulate in place
        block = slice(start, start + PRODUCT_BLOCK)
        product = torch.mm(a, b[block].T, out_dtype=out.dtype)
        out[:, block] = out[:, block].add_(product) if add else product


def _products_in_float32(*factors: Tensor | None) -> bool:
    """Whether torch.mm multiplies these into float32: half precision of one dtype on CUDA."""
    present = [factor for factor in factors if factor is not None]
    dtypes = {factor.dtype for factor in present}
    return present[0].is_cuda and len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}
