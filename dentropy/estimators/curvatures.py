"""The curvature R''(0): how the entropy's slope itself changes along a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import column, entropy_ratio
from dentropy.estimators.estimate import Estimate, check_estimate, check_same_rollouts
from dentropy.estimators.groups import Groups
from dentropy.estimators.jackknife import leave_one_out
from dentropy.estimators.slopes import ratio_slope, slope

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums


def curvature(
    sums: SequenceSums, *, per: str = "token", prompts: str = "random", first: Estimate | None = None
) -> Estimate:
    """Second derivative at η = 0 of R(η) = Σ w_i H_i / Σ w_i T_i, every ratio term included.

    With D = Σ T_i, H̄ = Σ H_i / D, q_i = ℓ'_i² + ℓ''_i and R' the exact slope,

        R'' = (1/D) Σ_i [ (H_i − H̄ T_i) q_i + 2 ℓ'_i (H'_i − R' T_i) + H''_i ] ,

    so that ΔH(η) ≈ η R' + η² R''/2. per="sequence" puts 1 for T_i and S for D.

    Args:
        sums: a table with first- and second-order columns, [S] float64.
        per: "token" or "sequence".
        prompts: "random" or "fixed", see `clustered_stderr`.
        first: the exact slope of this table where it is there already, with the same `per` and `prompts`.

    Returns:
        Estimate in nats per token (or per sequence) per unit of η². Its parts add up to value: score (the q
        term), cross (the ℓ' term), pathwise (from H'').

    Raises:
        ValueError: an unknown choice, no second-order columns, no rollout or no token at all, a value that is
            not finite (the rollout is named), a `first` of another kind.

    Example:
        >>> import torch
        >>> from dentropy import curvature, sequence_sums, token_stats
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits, d2logits = torch.randn(3, 6, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits, d2logits)
        >>> estimate = curvature(sequence_sums(stats, torch.tensor([0, 3, 4, 6])))
        >>> abs(sum(estimate.parts.values()) - estimate.value) < 1e-12
        True
    """
    ratio = entropy_ratio(sums, per)
    groups = Groups.of(sums.group, prompts, ratio.size)
    d2logp, d2entropy = column(sums, "d2logp"), column(sums, "d2entropy")
    dlogp, dentropy = column(sums, "dlogp"), column(sums, "dentropy")
    if first is None:
        first = slope(sums, estimator="exact", per=per, prompts=prompts)
    check_estimate("first", first, "slope", estimator="exact")
    check_same_rollouts("first", first, groups, per)
    size, total = ratio.size, ratio.total
    q = dlogp**2 + d2logp

    score = ratio.centred * q
    cross = 2 * dlogp * (dentropy - first.value * size)
    terms = score + cross + d2entropy
    through_slope = 2 * np.sum(size * dlogp) / total
    # cross without R': its ratio is another one when a group is left out
    without_slope = score + 2 * dlogp * dentropy + d2entropy
    totals = [size, ratio.centred, first.contributions * total, size * dlogp, without_slope, size * q]
    return Estimate.of(
        terms.sum() / total,
        ratio.influence(terms, size * q) - through_slope * first.influence,
        leave_one_out(_ratio_curvature, totals, 1, groups),
        groups,
        doubts=ratio.doubts,
        per=per,
        contributions=terms / total,
        parts={
            "score": float(score.sum() / total),
            "cross": float(cross.sum() / total),
            "pathwise": float(d2entropy.sum() / total),
        },
        name="curvature",
        estimator="exact",
    )


def _ratio_curvature(
    size: np.ndarray,
    entropy: np.ndarray,
    slope_terms: np.ndarray,
    dsize: np.ndarray,
    terms: np.ndarray,
    d2size: np.ndarray,
) -> np.ndarray:
    """The curvature of a set of rollouts from its totals, entropies less c T as in `ratio_slope`."""
    first = ratio_slope(size, entropy, slope_terms, dsize)
    return (terms - entropy / size * d2size - 2 * first * dsize) / size
