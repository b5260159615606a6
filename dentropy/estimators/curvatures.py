"""The curvature R''(0): how the entropy's slope itself changes along a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import PER, PROMPTS, check_choice, column, sizes
from dentropy.estimators.estimate import Estimate, with_errors
from dentropy.estimators.jackknife import leave_one_out
from dentropy.estimators.slopes import ratio_slope, slope
from dentropy.estimators.uncertainty import Groups

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums


def curvature(sums: SequenceSums, *, per: str = "token", prompts: str = "random") -> Estimate:
    """Second derivative at η = 0 of R(η) = Σ w_i H_i / Σ w_i T_i, every ratio term included.

    With D = Σ T_i, H̄ = Σ H_i / D, q_i = ℓ'_i² + ℓ''_i and R' the exact slope,

        R'' = (1/D) Σ_i [ (H_i − H̄ T_i) q_i + 2 ℓ'_i (H'_i − R' T_i) + H''_i ] ,

    so that ΔH(η) ≈ η R' + η² R''/2. per="sequence" puts 1 for T_i and S for D.

    Args:
        sums: a table with first- and second-order columns, [S] float64.
        per: "token" or "sequence".
        prompts: "random" or "fixed", see `clustered_stderr`.

    Returns:
        Estimate in nats per token (or per sequence) per unit of η². Its parts add up to value: score (the q
        term), cross (the ℓ' term), pathwise (from H'').

    Raises:
        ValueError: an unknown choice, no second-order columns, no rollout or no token at all, a value that is
            not finite (the rollout is named).

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
    check_choice("per", per, PER)
    check_choice("prompts", prompts, PROMPTS)
    size = sizes(sums, per)
    d2logp, d2entropy = column(sums, "d2logp"), column(sums, "d2entropy")
    first = slope(sums, estimator="exact", per=per)
    entropy, dlogp, dentropy = (column(sums, name) for name in ("entropy", "dlogp", "dentropy"))
    total = size.sum()
    centred = entropy - entropy.sum() / total * size
    q = dlogp**2 + d2logp

    score = centred * q
    cross = 2 * dlogp * (dentropy - first.value * size)
    terms = score + cross + d2entropy
    value = terms.sum() / total
    through_mean = np.sum(size * q) / total
    through_slope = 2 * np.sum(size * dlogp) / total
    influence = (terms - value * size - through_mean * centred) / total - through_slope * first.influence
    # cross without R': its ratio is another one when a group is left out
    totals = [
        size,
        centred,
        first.contributions * total,
        size * dlogp,
        score + 2 * dlogp * dentropy + d2entropy,
        size * q,
    ]
    groups = Groups.of(sums.group)
    jackknife = leave_one_out(_ratio_curvature, totals, 1, groups, prompts)
    return Estimate(
        **with_errors(value, influence, jackknife, groups=groups, prompts=prompts, per=per),
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
