"""The definition: what `dentropy` computes, written down as one would on paper, in float64 if the inputs are.

Nothing here is chunked, fused or fast; it is what the kernels and the plain path are held against. With raw logits u(η)
whose derivatives at η = 0 are given,

    z = softcap · tanh(u / softcap) / temperature ,      p = softmax(z) ,      a dot is d/dη at η = 0,

the six quantities of a token y are those of `TokenStats`, and a row of `SequenceSums` sums them over a rollout.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dentropy.stats.checks import check_linear, check_logits, check_targets, checked_cu_seqlens, checked_group
from dentropy.stats.tables import SequenceSums, TokenStats


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
    """`dentropy.token_stats` by its formulas: the same arguments, results and errors.

    Example:
        >>> import torch
        >>> from dentropy import reference
        >>> logits, dlogits = torch.zeros(1, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> reference.token_stats(logits, torch.tensor([0]), dlogits).dlogp.item()
        0.75
    """
    check_logits(logits, targets, dlogits, d2logits, temperature, softcap, validate)
    inside = logits != -torch.inf  # a token outside the vocabulary has p = 0, whatever its derivatives are
    working = (
        torch.float64 if torch.float64 in {t.dtype for t in (logits, dlogits, d2logits) if t is not None} else None
    )
    u, du, ddu = (None if t is None else t.to(working or torch.float32) for t in (logits, dlogits, d2logits))
    z, dz, ddz = _transformed(u, du, ddu, temperature, softcap)

    def mean(x: Tensor) -> Tensor:  # E_p[x]  [N, 1]
        return torch.where(inside, p * x, 0.0).sum(-1, keepdim=True)

    def at_target(x: Tensor) -> Tensor:  # x_y  [N]
        return x.gather(-1, targets.long()[:, None])[:, 0]

    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    h = -mean(logp)
    stats = TokenStats(at_target(logp), h[:, 0])
    if dz is None:
        return stats
    x = logp + h  # z − E z
    d = dz - mean(dz)  # ż − E ż
    stats = stats._replace(dlogp=at_target(d), dentropy=-mean(x * d)[:, 0])
    if ddz is None:
        return stats
    e = ddz - mean(ddz)  # z̈ − E z̈
    variance = mean(d * d)
    return stats._replace(
        d2logp=at_target(e) - variance[:, 0], d2entropy=-(variance + mean(x * e) + mean(x * d * d))[:, 0]
    )


def _in_working_precision(*tensors: Tensor | None) -> list[Tensor | None]:
    """float64 where any of them is, float32 otherwise."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return [None if t is None else t.to(torch.float64 if double else torch.float32) for t in tensors]


def _transformed(u, du, ddu, temperature: float, softcap: float | None):
    """z and its derivatives from raw logits and theirs, by the chain rule."""
    if softcap is None:
        return tuple(None if t is None else t / temperature for t in (u, du, ddu))
    t = torch.tanh(u / softcap)
    z = torch.where(u == -torch.inf, u, softcap * t) / temperature
    slope = (1 - t * t) / temperature  # dz/du
    bend = -2 * t / softcap * slope  # d²z/du²
    dz = None if du is None else slope * du
    return z, dz, None if ddu is None else slope * ddu + bend * du * du


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
    validate: bool = False,
) -> TokenStats:
    """`dentropy.linear_token_stats` of a whole head: logits = hidden · weightᵀ + bias, then `token_stats`."""
    check_linear(hidden, weight, dhidden, dweight, bias, dbias, temperature, softcap)
    check_targets(targets, len(hidden), len(weight), hidden.device, validate)
    h, w, dh, dw, b, db = _in_working_precision(hidden, weight, dhidden, dweight, bias, dbias)
    logits = h @ w.T if b is None else h @ w.T + b
    terms = [None if dh is None else dh @ w.T, None if dw is None else h @ dw.T, db]
    terms = [term for term in terms if term is not None]
    dlogits = None if not terms else sum(terms).expand_as(logits)
    return token_stats(logits, targets, dlogits, temperature=temperature, softcap=softcap)


def sequence_sums(stats: TokenStats, cu_seqlens, *, group=None) -> SequenceSums:
    """`dentropy.sequence_sums` of finite values, token by token, in float64."""
    ends = checked_cu_seqlens(cu_seqlens, len(stats.logp))
    rows = []
    for start, stop in zip(ends[:-1], ends[1:]):
        token = {n: v[start:stop].double().cpu().numpy() for n, v in stats._asdict().items() if v is not None}
        row = {"n_tokens": float(stop - start)} | {name: values.sum() for name, values in token.items()}
        if stats.dlogp is not None:
            h, dlogp, length = token["entropy"], token["dlogp"], len(token["entropy"])
            row["entropy_dlogp"] = sum(h[k] * dlogp[k] for k in range(length))
            row["entropy_to_go"] = sum(dlogp[k] * h[k + 1 :].sum() for k in range(length))
            row["length_to_go"] = sum(dlogp[k] * (length - 1 - k) for k in range(length))
        if stats.d2logp is not None:
            before = [dlogp[:j].sum() for j in range(length)]
            bend = [before[j] ** 2 + token["d2logp"][:j].sum() for j in range(length)]
            row["dentropy_to_go"] = sum(before[j] * token["dentropy"][j] for j in range(length))
            row["entropy_to_go_2"] = sum(bend[j] * h[j] for j in range(length))
            row["length_to_go_2"] = sum(bend)
        rows.append(row)
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in (rows[0] if rows else ())}
    return SequenceSums(**columns, group=checked_group(group, len(ends) - 1), rollout=np.arange(len(ends) - 1))
