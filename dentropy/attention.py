"""Packed causal attention with tangents, as an attention function that Hugging Face models call.

A packed row holds several sequences one after the other; `cu_seq_lens_q` says where each begins. Every sequence
attends to itself alone, so the cost is the sum of T², not the square of the sum. If the query, key or value carries
a forward-mode tangent, the output does too; both come from the closed form

    s = scaling · q kᵀ,   p = softmax(s),   o = p v,
    ṡ = scaling · (q̇ kᵀ + q k̇ᵀ),   ṗ = p ∘ (ṡ − Σ p ṡ),   ȯ = ṗ v + p v̇,

with softcap s → c·tanh(s/c), sliding windows (key j is seen from query i while i − j < window) and attention sinks
(one more logit per head that takes probability and has no value).
"""

from collections.abc import Iterator
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAME, NESTABLE = "dentropy", "dentropy_nestable"

# Queries are taken this many at a time: the scores need memory linear in a sequence's length, and short sequences of
# one length share their operations.
QUERY_BLOCK = 512


@cache
def register(name: str = NAME) -> str:
    """Makes a function known to transformers; returns the name to give as `attn_implementation`.

    "dentropy" carries the tangents of dual tensors; "dentropy_nestable" is plain PyTorch arithmetic, for torch.func's
    transforms, which wrap tensors their own way and nest. Causality and sliding windows are built here; of the mask a
    model would make only its local size is asked, to refuse those that mean more (see `_check_mask`).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, {NAME: attention_forward, NESTABLE: nestable_attention_forward}[name])
    AttentionMaskInterface.register(name, _local_size)
    return name


class UnseenMask(ValueError):
    """A model masks in a way that `sliding_window` does not tell its attention function."""


def _local_size(*_args, local_size=None, **_kwargs) -> Tensor | None:
    """Stands for a mask: the size of the window or chunk it would cut out, None for plain causality."""
    return None if local_size is None else torch.tensor(local_size)


def _check_mask(mask: Tensor | None, sliding_window: int | None) -> None:
    if mask is not None and (mask.ndim != 0 or int(mask) != sliding_window):
        raise UnseenMask("attention_mask: the model masks more than causality and its sliding_window say")


def attention_forward(module, query, key, value, attention_mask=None, *, s_aux=None, **settings) -> tuple[Tensor, None]:
    """The signature transformers expects of an attention function.

    query [B, H, S, D]; key, value [B, Hkv, S, D] with H a multiple of Hkv; s_aux [H] (sinks); cu_seq_lens_q
    [sequences + 1] for a packed row (B = 1), or None where every row is one sequence. Returns ([B, S, H, D], None);
    the output is a dual tensor where any input is.
    """
    _check_mask(attention_mask, settings.get("sliding_window"))
    duals = [forward_ad.unpack_dual(x) for x in (query, key, value)]
    primals, tangents = [d.primal for d in duals], [d.tangent for d in duals]
    sinks, dsinks = (None, None) if s_aux is None else forward_ad.unpack_dual(s_aux)
    if dsinks is None and all(t is None for t in tangents):
        return _packed_attention(primals, None, sinks, None, **settings)[0], None
    tangents = [torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)]
    if sinks is not None and dsinks is None:
        dsinks = torch.zeros_like(sinks)
    return forward_ad.make_dual(*_packed_attention(primals, tangents, sinks, dsinks, **settings)), None


def nestable_attention_forward(module, query, key, value, attention_mask=None, *, s_aux=None,
                               **settings) -> tuple[Tensor, None]:
    """`attention_forward` without a rule of its own for tangents."""
    _check_mask(attention_mask, settings.get("sliding_window"))
    return _packed_attention((query, key, value), None, s_aux, None, **settings)[0], None


def _packed_attention(primals, tangents, sinks, dsinks, *, scaling=None, sliding_window=None, softcap=None,
                      cu_seq_lens_q=None, **_unused) -> tuple[Tensor, Tensor | None]:
    """Output [B, S, H, Dv] and its tangent, or None. Sequences of one length are computed together."""
    batch, heads, length, size = primals[0].shape
    lengths = [length] * batch if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    scaling = size**-0.5 if scaling is None else scaling
    primals, tangents = ([x.transpose(0, 1).flatten(1, 2) for x in xs or ()] for xs in (primals, tangents))
    pieces, order = [], []
    for places, n in _groups_of_one_length(lengths):
        rows = torch.tensor(places, device=primals[0].device)[:, None] + torch.arange(n, device=primals[0].device)
        chosen, moving = ([x[:, rows].transpose(0, 1) for x in xs] for xs in (primals, tangents))
        pieces.append(_causal_attention(*chosen, tangents=moving, scaling=scaling, window=sliding_window,
                                        softcap=softcap, sinks=sinks, dsinks=dsinks))
        order.append(rows.flatten())
    back = torch.argsort(torch.cat(order))
    out, dout = ([part for part in column if part is not None] for column in zip(*pieces, strict=True))
    shape = (batch, length, heads, primals[2].shape[-1])
    return torch.cat(out)[back].view(shape), torch.cat(dout)[back].view(shape) if dout else None


def _groups_of_one_length(lengths: list[int]) -> Iterator[tuple[list[int], int]]:
    """(where the sequences begin, their length), at most about QUERY_BLOCK tokens at a time."""
    starts: dict[int, list[int]] = {}
    for start, n in zip(accumulate(lengths, initial=0), lengths):
        starts.setdefault(n, []).append(start)
    for n, places in starts.items():
        together = max(1, QUERY_BLOCK // max(n, 1))
        for i in range(0, len(places), together):
            yield places[i : i + together], n


def _causal_attention(q, k, v, *, tangents, scaling, window, softcap, sinks, dsinks):
    """M sequences of T tokens: q [M, H, T, D], k and v [M, Hkv, T, D] to o [M·T, H, D] and ȯ, or None."""
    heads, length = q.shape[1:3]
    dtype, work = q.dtype, torch.promote_types(q.dtype, torch.float32)
    grouped = (k.shape[1], heads // k.shape[1])

    def by_group(x):  # [M, heads, T, D] -> [M, Hkv, heads / Hkv, T, D], in the working precision
        return x.to(work).unflatten(1, (grouped[0], -1))

    q, k, v = by_group(q), by_group(k), by_group(v)
    dq, dk, dv = (by_group(t) for t in tangents) if tangents else (None, None, None)
    outs, douts = [], []
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        low = 0 if window is None else max(0, first - window + 1)
        rows, keys = slice(first, last), slice(low, last)
        kt = k[..., keys, :].transpose(-1, -2)
        s = q[..., rows, :] @ kt * scaling
        t = None
        if softcap is not None:
            t = torch.tanh(s / softcap)
            s = softcap * t
        s = s.masked_fill(_hidden_keys(first, last, low, window, s.device), -torch.inf)
        p, p_sink = _softmax(s, sinks, grouped)
        outs.append(p @ v[..., keys, :])
        if dq is None:
            continue
        ds = (dq[..., rows, :] @ kt + q[..., rows, :] @ dk[..., keys, :].transpose(-1, -2)) * scaling
        if t is not None:
            ds = ds * (1 - t * t)
        mean = (p * ds).sum(-1, keepdim=True)
        if p_sink is not None:
            mean = mean + p_sink * dsinks.to(work).view(*grouped, 1, 1)
        douts.append((p * (ds - mean)) @ v[..., keys, :] + p @ dv[..., keys, :])

    def packed(blocks):  # [M, Hkv, heads / Hkv, T, D] -> [M · T, heads, D]
        return torch.cat(blocks, dim=-2).flatten(1, 2).transpose(1, 2).flatten(0, 1).to(dtype)

    return packed(outs), packed(douts) if douts else None


def _hidden_keys(first: int, last: int, low: int, window: int | None, device) -> Tensor:
    """True where query `first`..`last` must not see key `low`..`last`: later keys, and those before the window."""
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(low, last, device=device)
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def _softmax(s: Tensor, sinks: Tensor | None, grouped: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the keys [..., Q, K] and of the sink [..., Q, 1] (None without sinks)."""
    if sinks is None:
        return torch.softmax(s, -1), None
    column = sinks.to(s.dtype).view(*grouped, 1, 1).expand(*s.shape[:-1], 1)
    p = torch.softmax(torch.cat([s, column], -1), -1)
    return p[..., :-1], p[..., -1:]
