"""Packed causal attention and its tangent as PyTorch operators, and their plain PyTorch form.

    s = scaling · q kᵀ,   p = softmax(s),   o = p v,
    ṡ = scaling · (q̇ kᵀ + q k̇ᵀ),   ṗ = p ∘ (ṡ − Σ p ṡ),   ȯ = ṗ v + p v̇,

with softcap s → c·tanh(s/c), sliding windows (key j is seen from query i while i − j < window) and attention sinks
(one more logit per head that takes probability and has no value). Every sequence attends to itself alone, so the cost
is the sum of T², not the square of the sum.

A compiler sees neither through a Triton kernel nor through a loop over sequences of any lengths, and operators drop
tangents. Hence these are opaque operators of plain tensors, each the others' derivative:

    attention           o, and lse [H, total], which is empty where the plain form serves
    attention_tangent   ȯ, from o and lse
    attention_adjoint   the gradients of q, k, v and sinks from that of o, the transpose of the tangent. It is linear,
                        and its own reverse mode is the tangent again: `compiled_layers` is built on that, and traces it
                        without ever running it. Reverse mode proper goes through `plain_attention`.

    q [total, H, D], k [total, Hkv, D], v [total, Hkv, Dv], any strides; H is a multiple of Hkv
    dq, dk, dv, dsinks   of the shape and dtype of q, k, v, sinks; None is a tangent of 0 and costs nothing
    cu_seqlens [S + 1]   where each sequence begins, from 0 to total; max_length is no less than the longest
    scaling              of the scores; window, softcap and sinks [H] may be None
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from dentropy.stats.dispatch import kernels_serve

# The plain form takes a sequence's queries this many at a time, so that scores need memory linear in its length and few
# are computed to be masked; short neighbours of one length share their operations, up to so many tokens. A microbatch
# has its sequences by length (passes/microbatches.py), so there all of one length are neighbours.
QUERY_BLOCK = 64
TOGETHER = 1024


@torch.library.custom_op("dentropy::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    settings = dict(scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    if kernels_serve(q):
        from dentropy.kernels.attention import attention as kernel  # Triton loads on first use

        out, lse = kernel(q, k, v, cu_seqlens, max_length, **settings)
        return out.contiguous(), lse
    return plain_attention((q, k, v), None, cu_seqlens, **settings)[0], q.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("dentropy::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dsinks: Tensor | None = None,
) -> Tensor:
    settings = dict(scaling=scaling, window=window, softcap=softcap, sinks=sinks, dsinks=dsinks)
    if kernels_serve(q):
        from dentropy.kernels.attention_tangent import attention_tangent as kernel

        return kernel(q, k, v, dq, dk, dv, out, lse, cu_seqlens, **settings)
    return plain_attention((q, k, v), (dq, dk, dv), cu_seqlens, **settings)[1]


@torch.library.custom_op("dentropy::attention_adjoint", mutates_args=())
def attention_adjoint(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise NotImplementedError("attention_adjoint is for tracing; with gradients use plain_attention")


@attention.register_fake
def _(q, k, v, cu_seqlens, max_length, scaling, window=None, softcap=None, sinks=None):
    rows = (q.shape[1], q.shape[0]) if kernels_serve(q) else (0,)
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(rows, dtype=torch.float32)


@attention_tangent.register_fake
def _(q, k, v, dq, dk, dv, out, lse, cu_seqlens, scaling, window=None, softcap=None, sinks=None, dsinks=None):
    return torch.empty_like(out)


@attention_adjoint.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens, scaling, window, softcap, sinks):
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        q.new_empty(0 if sinks is None else len(sinks)),
    )


def _keep(ctx, inputs, output):
    q, k, v, cu_seqlens, _, *settings, sinks = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, sinks)
    ctx.settings = settings


def _transpose(ctx, grad, _):
    *tensors, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = attention_adjoint(grad, *tensors, *ctx.settings, sinks)
    return dq, dk, dv, *[None] * 5, None if sinks is None else dsinks


def _keep_adjoint(ctx, inputs, output):
    _, *tensors, scaling, window, softcap, sinks = inputs
    ctx.set_materialize_grads(False)  # what is not asked for stays None and costs nothing
    ctx.save_for_backward(*tensors, sinks)
    ctx.settings = scaling, window, softcap


def _transpose_adjoint(ctx, dq, dk, dv, dsinks):
    """With respect to the gradient alone, in which the adjoint is linear."""
    q, k, v, out, lse, cu_seqlens, sinks = ctx.saved_tensors
    return attention_tangent(
        q, k, v, dq, dk, dv, out, lse, cu_seqlens, *ctx.settings, sinks, None if sinks is None else dsinks
    ), *[None] * 10


attention.register_autograd(_transpose, setup_context=_keep)
attention_adjoint.register_autograd(_transpose_adjoint, setup_context=_keep_adjoint)


def attention_with_tangent(
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    cu_seqlens: Tensor,
    max_length: int,
    *,
    dsinks: Tensor | None = None,
    **settings,
) -> tuple[Tensor, Tensor]:
    """The output and its tangent, both [total, H, Dv]."""
    if not kernels_serve(*primals):  # both at once share their probabilities
        return plain_attention(primals, tangents, cu_seqlens, **settings, dsinks=dsinks)
    out, lse = attention(*primals, cu_seqlens, max_length, **settings)
    return out, attention_tangent(*primals, *tangents, out, lse, cu_seqlens, **settings, dsinks=dsinks)


def plain_attention(
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None] | None,
    cu_seqlens: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dsinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output [total, H, Dv] and its tangent (None where `tangents` is), in PyTorch arithmetic that autograd and
    torch.func go through. Neighbours of one length are computed together."""
    if len(primals[0]) == 0:  # no sequence has a token
        out, dout = (primals[0].new_empty(0, primals[0].shape[1], primals[2].shape[-1]) for _ in range(2))
        return out, None if tangents is None else dout
    pieces = list(_pieces_of_one_length(cu_seqlens.diff().tolist()))

    def cut(x):  # [total, heads, D] -> of each piece [M, heads, T, D]
        if x is None:
            return [None] * len(pieces)
        parts = x.split([m * n for m, n in pieces])
        return [part.unflatten(0, piece).transpose(1, 2) for part, piece in zip(parts, pieces, strict=True)]

    settings = dict(scaling=scaling, window=window, softcap=softcap, sinks=sinks, dsinks=dsinks)
    chosen = zip(*(cut(x) for x in primals), strict=True)
    moving = [None] * len(pieces) if tangents is None else zip(*(cut(x) for x in tangents), strict=True)
    found = [_causal_attention(*x, tangents=dx, **settings) for x, dx in zip(chosen, moving, strict=True)]
    outs, douts = zip(*found, strict=True)
    return torch.cat(outs), None if tangents is None else torch.cat(douts)


def _pieces_of_one_length(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(how many, their length) of neighbours of one length, at most about TOGETHER tokens at a time."""
    for n, same in groupby(filter(None, lengths)):
        left, together = len(list(same)), max(1, TOGETHER // n)
        while left > 0:
            yield min(left, together), n
            left -= together


def _causal_attention(q, k, v, *, tangents, scaling, window, softcap, sinks, dsinks):
    """M sequences of T tokens: q [M, H, T, D], k and v [M, Hkv, T, D] to o [M·T, H, D] and ȯ, or None.

    A batch of products is one sequence's key head, and the query heads that use it are more rows of them.
    """
    (n_sequences, heads, length, _), key_heads = q.shape, k.shape[1]
    dtype, work, group = q.dtype, torch.promote_types(q.dtype, torch.float32), heads // key_heads

    def by_key_head(x):  # [M, heads, T, D] -> [M · Hkv, T · heads / Hkv, D], in the working precision
        return x.to(work).unflatten(1, (key_heads, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1)

    def of_rows(x):  # [H] -> [M · Hkv, QUERY_BLOCK · heads / Hkv, 1]
        rows = x.to(work).view(key_heads, 1, group).expand(n_sequences, -1, min(QUERY_BLOCK, length), -1)
        return rows.flatten(2, 3).flatten(0, 1).unsqueeze(-1)

    dq, dk, dv = (None, None, None) if tangents is None else (x if x is None else by_key_head(x) for x in tangents)
    q, k, v = by_key_head(q) * scaling, by_key_head(k), by_key_head(v)
    sinks, dsinks = (x if x is None else of_rows(x) for x in (sinks, dsinks))
    # q̇ kᵀ + q k̇ᵀ is one product: narrow ones are slow. p v and p v̇ are two, so that o has the same bits without v̇.
    sides = [(x, y) for x, y in ((dq if dq is None else dq * scaling, k), (q, dk)) if x is not None and y is not None]
    left, right = (torch.cat(x, -1) for x in zip(*sides, strict=True)) if sides else (None, None)
    outs, douts = [], []
    # From the last to the first: what a block leaves free then holds all of the next one. Scores that grow find no room
    # in what smaller ones left, and an allocator would hold the square of the length.
    for first in reversed(range(0, length, QUERY_BLOCK)):
        last = min(first + QUERY_BLOCK, length)
        low = 0 if window is None else max(0, first - window + 1)
        rows, keys = slice(first * group, last * group), slice(low, last)
        s = q[:, rows] @ k[:, keys].transpose(1, 2)
        if softcap is not None:
            t = torch.tanh(s / softcap)
            s = softcap * t
        of_some = first if window is None else low  # keys before it are seen by every query of the block
        hidden = _hidden_keys(first, last, of_some, window, group, s.device)
        s[..., of_some - low :].masked_fill_(hidden, -torch.inf)
        if sinks is not None:  # a key without a value
            s = torch.cat([s, sinks[:, : s.shape[1]]], -1)
        p = torch.softmax(s, -1)
        of_keys = p[..., : last - low]
        outs.append(of_keys @ v[:, keys])
        if tangents is None:
            continue
        terms = [] if dv is None else [of_keys @ dv[:, keys]]
        if sides or dsinks is not None:
            ds = left[:, rows] @ right[:, keys].transpose(1, 2) if sides else torch.zeros_like(of_keys)
            if softcap is not None:
                ds = ds * (1 - t * t)
            if sinks is not None:
                dsink = torch.zeros_like(s[..., -1:]) if dsinks is None else dsinks[:, : s.shape[1]]
                ds = torch.cat([ds, dsink], -1)
            x = torch.ops.aten._softmax_backward_data(ds, p, -1, work)  # p (ṡ − Σ p ṡ): its matrix is symmetric
            terms.append(x[..., : last - low] @ v[:, keys])
        douts.append(sum(terms))

    def packed(blocks):  # [M · Hkv, T · heads / Hkv, D] in blocks, the last first -> [M · T, heads, D]
        x = torch.cat(blocks[::-1], dim=1).unflatten(0, (n_sequences, key_heads)).unflatten(2, (length, group))
        return x.transpose(1, 2).flatten(2, 3).flatten(0, 1).to(dtype)

    return packed(outs), packed(douts) if douts else None


def _hidden_keys(first: int, last: int, low: int, window: int | None, group: int, device) -> Tensor:
    """[(last - first) · group, last - low], True where query `first`..`last`, in `group` rows each, must not see key
    `low`..`last`: later keys, and those before the window."""
    queries = torch.arange(first * group, last * group, device=device) // group
    distance = queries[:, None] - torch.arange(low, last, device=device)
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)
