"""The definition: what dentropy computes, written down as on paper, in float64 where an input is.

Nothing here is chunked, fused or fast: the kernels and the plain path are held against it. Raw logits u(η) are given at
η = 0 with their derivatives; a dot is d/dη, y the token that was sampled, E and Var are taken under p:

    z = softcap · tanh(u / softcap) / temperature        p = softmax(z)        d = ż − E ż

    logp   = log p_y                 entropy   = −E log p
    dlogp  = d_y                     dentropy  = −E (z − E z) d              fisher = Var ż = E d²
    d2logp = z̈_y − E z̈ − Var ż       d2entropy = −[Var ż + E (z − E z)(z̈ − E z̈) + E (z − E z) d²]

`SequenceSums` has the formulas of the sums over a rollout. Test your own implementation against this one.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dentropy.stats.checks import check_linear, check_logits, check_targets
from dentropy.stats.sequence_sums import table_of
from dentropy.stats.tables import SequenceSums, TokenStats, working_dtype


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
    return _closed_form(logits, targets, dlogits, d2logits, temperature, softcap)


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
    """`dentropy.linear_token_stats` by its formulas: the same arguments, results and errors, for whole heads.

    Raises:
        ValueError: as `dentropy.linear_token_stats`; a `process_group`.

    Example:
        >>> import torch
        >>> from dentropy import reference
        >>> hidden, weight = torch.zeros(1, 2), torch.ones(4, 2)
        >>> round(reference.linear_token_stats(hidden, weight, torch.tensor([0])).entropy.item(), 4)
        1.3863
    """
    if process_group is not None:
        raise ValueError(f"process_group: {process_group!r}, expected None, because the reference takes whole heads")
    check_linear(hidden, weight, dhidden, dweight, bias, dbias, temperature, softcap)
    check_targets(targets, len(hidden), len(weight), hidden.device, validate)
    given = (hidden, weight, dhidden, dweight, bias, dbias)
    h, w, dh, dw, b, db = (None if t is None else t.to(working_dtype(*given)) for t in given)
    logits = h @ w.T if b is None else h @ w.T + b
    terms = [] if dh is None else [dh @ w.T]
    terms += [] if dw is None else [h @ dw.T]
    terms += [] if db is None else [db]
    dlogits = sum(terms, torch.zeros_like(logits)) if terms else None
    return _closed_form(logits, targets, dlogits, None, temperature, softcap)


@torch.no_grad()
def _closed_form(logits, targets, dlogits, d2logits, temperature: float, softcap: float | None) -> TokenStats:
    dtype = working_dtype(logits, dlogits, d2logits)
    u, du, ddu = (None if t is None else t.to(dtype) for t in (logits, dlogits, d2logits))
    capped = (u, du, ddu) if softcap is None else _softcapped(u, du, ddu, softcap)
    z, dz, ddz = (None if t is None else t / temperature for t in capped)
    outside = z == -math.inf  # of the vocabulary: 0 in every mean, where 0 · inf could appear too
    missing = (targets < 0) | (targets >= logits.shape[1])  # such a row is NaN
    columns = targets.long().masked_fill(missing, 0)[:, None]

    def at_target(x: Tensor) -> Tensor:  # [N]
        return x.gather(1, columns)[:, 0].masked_fill(missing, math.nan)

    def mean(x: Tensor) -> Tensor:  # E x [N, 1]
        return (p * x.masked_fill(outside, 0.0)).sum(1, keepdim=True).masked_fill(missing[:, None], math.nan)

    logp = torch.log_softmax(z, 1)
    p = logp.exp()
    h = -mean(logp)
    stats = TokenStats(at_target(logp), h[:, 0])
    if dz is None:
        return stats
    x = logp + h  # z − E z
    d = dz - mean(dz)
    variance = mean(d * d)[:, 0]
    stats = stats._replace(dlogp=at_target(d), dentropy=-mean(x * d)[:, 0], fisher=variance)
    if ddz is None:
        return stats
    e = ddz - mean(ddz)
    return stats._replace(d2logp=at_target(e) - variance, d2entropy=-(variance + mean(x * e + x * d * d)[:, 0]))


def _softcapped(u: Tensor, du: Tensor | None, ddu: Tensor | None, softcap: float) -> tuple[Tensor | None, ...]:
    """softcap · tanh(u / softcap), and its derivatives by the chain rule through slope and bend."""
    t = torch.tanh(u / softcap)
    slope = 1 - t * t
    bend = -2 * t * slope / softcap
    return (
        torch.where(u == -math.inf, u, softcap * t),  # a token outside the vocabulary stays there
        None if du is None else slope * du,
        None if ddu is None else slope * ddu + bend * du * du,
    )


def sequence_sums(stats: TokenStats, cu_seqlens, *, group=None) -> SequenceSums:
    """`dentropy.sequence_sums` token by token: the same arguments, results and errors.

    Its time grows with the square of a rollout's length.

    Example:
        >>> import torch
        >>> from dentropy import TokenStats, reference
        >>> h, dlogp = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 10.0, 100.0])
        >>> sums = reference.sequence_sums(TokenStats(-h, h, dlogp, dlogp), [0, 3])
        >>> sums.entropy_to_go.item(), sums.length_to_go.item()  # 1 · (2 + 4) + 10 · 4, 1 · 2 + 10 · 1
        (46.0, 12.0)
    """
    return table_of(_columns, stats, cu_seqlens, group)


def _columns(stats: TokenStats, ends: np.ndarray) -> dict[str, np.ndarray]:
    tokens = {name: v.detach().double().cpu().numpy() for name, v in stats._asdict().items() if v is not None}
    spans = [slice(start, end) for start, end in zip(ends[:-1], ends[1:])]
    columns = {"n_tokens": np.diff(ends)}
    columns |= {name: [values[span].sum() for span in spans] for name, values in tokens.items()}
    if "dlogp" in tokens:
        pairs = [(tokens["entropy"][span], tokens["dlogp"][span]) for span in spans]
        columns["entropy_dlogp"] = [(h * d).sum() for h, d in pairs]
        columns["entropy_to_go"] = [sum(d[k] * h[k + 1 :].sum() for k in range(len(d))) for h, d in pairs]
        columns["length_to_go"] = [sum(d[k] * (len(d) - (k + 1)) for k in range(len(d))) for _, d in pairs]
    if "d2logp" in tokens:
        triples = [[tokens[name][span] for name in ("dlogp", "d2logp", "dentropy", "entropy")] for span in spans]
        rows = [_second_order_row(*triple) for triple in triples]
        columns |= {name: [row[i] for row in rows] for i, name in enumerate(PREFIX_COLUMNS)}
    return {name: np.array(column, dtype=np.float64) for name, column in columns.items()}


PREFIX_COLUMNS = ("dentropy_to_go", "entropy_to_go_2", "length_to_go_2")


def _second_order_row(dlogp: np.ndarray, d2logp: np.ndarray, dentropy: np.ndarray, entropy: np.ndarray) -> tuple:
    """Σ_j A_j dh_j, Σ_j B_j h_j and Σ_j B_j, with A_j = Σ_{k<j} dlogp_k and B_j = A_j² + Σ_{k<j} d2logp_k."""
    n = len(dlogp)
    a = [dlogp[:j].sum() for j in range(n)]
    b = [a[j] ** 2 + d2logp[:j].sum() for j in range(n)]
    return sum(a[j] * dentropy[j] for j in range(n)), sum(b[j] * entropy[j] for j in range(n)), sum(b)
