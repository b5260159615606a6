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
CPU_CHUNK = 2**19
DEVICE_CHUNK = 2**24
# Elements of one chunk of logits made from hidden states: enough rows to run the product at full speed.
LOGITS_CHUNK = 2**26
PRODUCT_BLOCK = 2**14


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
    state = torch.empty(STATE_FIELDS[len(given) - 1], n_rows, dtype=dtype, device=logits.device)
    # A target outside is read at a valid place, and not counted as found.
    found = (targets >= 0) & (targets < vocabulary)
    columns = targets.long().clamp(0, vocabulary - 1).unsqueeze(1)
    for start in range(0, n_rows, chunk):
        part = slice(start, min(start + chunk, n_rows))
        views = buffers[:, : part.stop - start]
        for view, tensor in zip(views, given):
            view.copy_(tensor[part])
        fields = _chunk_state(
            *views[: len(given)],
            scratch=views[len(given) :],
            columns=columns[part],
            found=found[part].unsqueeze(1),
            scale=scale,
            softcap=softcap,
        )
        for row, field in zip(state, fields):
            row[part] = field.squeeze(1)
    return state


def _chunk_state(
    u: Tensor,
    du: Tensor | None = None,
    ddu: Tensor | None = None,
    *,
    scratch: Tensor,
    columns: Tensor,
    found: Tensor,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """The fields of the state, each [n, 1], for n rows of logits and tangents [n, V], all of which are overwritten.

    Works in units in which z = scale · u, so that temperature and softcap cost no pass of their own. Only u
    minus its maximum is ever scaled: that keeps it at or below 0, and with it logp, whatever the rounding.
    """
    mass, product = scratch
    tangents = [tangent for tangent in (du, ddu) if tangent is not None]
    if softcap is not None:
        _apply_softcap(u, du, ddu, softcap, mass)
    at_target = [torch.where(found, tensor.gather(1, columns), 0.0) for tensor in (u, *tangents)]
    top = u.amax(1, keepdim=True)
    u.sub_(top).mul_(scale / math.log(2))  # PyTorch's exp2 is several times faster than its exp on a CPU
    # Boolean passes cost as much as exponentials on a CPU, so they run only where a −inf is there; on other
    # devices asking would synchronize.
    masked = torch.isneginf(u) if not u.is_cpu or not u.amin(1).gt(-math.inf).all() else None
    if masked is not None:
        masked |= torch.isneginf(top)  # a row of −inf alone: −inf − (−inf) is NaN
        u.masked_fill_(masked, -math.inf)
    torch.exp2(u, out=mass)
    if masked is not None:
        for tensor in (u, *tangents):
            tensor.masked_fill_(masked, 0.0)
    total = mass.sum(1, keepdim=True)
    inverse = total.masked_fill(total == 0.0, 1.0).reciprocal_()

    def moment(first: Tensor, *others: Tensor) -> Tensor:
        torch.mul(mass, first, out=product)
        for factor in others:
            product.mul_(factor)
        return product.sum(1, keepdim=True)

    mean_u = moment(u) * inverse
    state = [found.to(u.dtype), at_target[0], top, total, mean_u * math.log(2)]
    u.sub_(mean_u).mul_(math.log(2))  # from here on z − E z
    means = []
    for tangent in tangents:
        base = moment(tangent) * inverse
        tangent.sub_(base)
        # The second mean is what rounding left of a first one that is large beside the spread of ż.
        means.append((base, moment(tangent) * inverse))
    if du is None:
        return state
    du.sub_(means[0][1])
    others = None if ddu is None else scale * moment(ddu, u) + scale**2 * moment(du, du, u)
    torch.mul(mass, du, out=product)
    covariance, spread = (factor.mul_(product).sum(1, keepdim=True) for factor in (u, du))
    state += [at_target[1], *means[0], covariance, spread]
    if ddu is not None:
        base, rest = means[1]
        everything = _everything(total, found)
        variance = scale**2 * spread / everything
        state += [scale * (at_target[2] - base - rest) - variance, -(variance + others / everything)]
    return state


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
    chunk = max(1, min(n_rows, LOGITS_CHUNK // vocabulary))
    moving = any(tensor is not None for tensor in (dhidden, dweight, dbias))
    buffers = torch.empty(1 + moving, chunk, vocabulary, dtype=dtype, device=hidden.device)
    parts = []
    for start in range(0, max(n_rows, 1), chunk):  # no rows at all still make one, empty, part
        part = slice(start, min(start + chunk, n_rows))
        logits, *tangent = buffers[:, : part.stop - start]
        _write_products(logits, bias, (hidden[part], weight))
        if moving:
            moved = None if dhidden is None else dhidden[part]
            _write_products(tangent[0], dbias, (moved, weight), (hidden[part], dweight))
        parts.append(_state_of_logits(logits, targets[part], *tangent, scale=scale, softcap=softcap))
    state = torch.cat(parts, 1)  # gathered whole: how many rows make a part depends on this shard's size
    return _stats_of_states(state.unsqueeze(0) if gather is None else gather(state), scale)


def _write_products(out: Tensor, bias: Tensor | None, *products: tuple[Tensor | None, Tensor | None]) -> None:
    """out [n, V] = bias + the sum of a bᵀ over the pairs a [n, D], b [V, D] without a None."""
    written = bias is not None
    if written:
        out.copy_(bias)
    for a, b in products:
        if a is None or b is None:
            continue
        if a.dtype == out.dtype:
            out.addmm_(a, b.T, beta=float(written))  # with beta = 0 what `out` held is not read
        else:  # in blocks of the vocabulary, because this form of the product cannot accumulate in place
            for start in range(0, len(b), PRODUCT_BLOCK):
                block = slice(start, start + PRODUCT_BLOCK)
                product = torch.mm(a, b[block].T, out_dtype=out.dtype)
                out[:, block] = out[:, block].add_(product) if written else product
        written = True
    if not written:
        out.zero_()


def _products_in_float32(*factors: Tensor | None) -> bool:
    """Whether torch.mm multiplies these into float32: half precision of one dtype on CUDA."""
    present = [factor for factor in factors if factor is not None]
    dtypes = {factor.dtype for factor in present}
    return present[0].is_cuda and len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}
