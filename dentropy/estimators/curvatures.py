"""The curvature R''(0): how the entropy's slope itself changes along a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import check_choice, column, entropy_ratio
from dentropy.estimators.estimate import Estimate, check_estimate, check_same_rollouts
from dentropy.estimators.groups import Groups
from dentropy.estimators.jackknife import leave_one_out
from dentropy.estimators.reweighting import FORM
from dentropy.estimators.slopes import ratio_slope, slope

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

ESTIMATORS = ("exact", "causal")


def curvature(
    sums: SequenceSums,
    *,
    estimator: str = "exact",
    per: str = "token",
    prompts: str = "random",
    first: Estimate | None = None,
) -> Estimate:
    """Second derivative at η = 0 of the entropy R(η), every ratio term included: ΔH(η) ≈ η R' + η² R''/2.

    Rollout i has T_i tokens, D = Σ T_i, H̄ = Σ H_i / D. The curvature is Σ_i x_i / D with, R' being the slope of
    the same estimator,

        "exact"    x_i = (H_i − H̄ T_i)(ℓ'_i² + ℓ''_i) + 2 ℓ'_i (H'_i − R' T_i) + H''_i
        "causal"   x_i = Σ_j [(h_j − H̄)(A_j² + Σ_{k<j} d2logp_k) + 2 A_j (dh_j − R') + d2h_j] ,   A_j = Σ_{k<j} dlogp_k

    These are the second derivatives of `importance` on this very batch, with sequence and with prefix weights. Both
    have the same limit. What comes after a token adds noise to the exact one alone: the causal one has half the
    standard error where rollouts have some tens of tokens. per="sequence" puts 1 for T_i and S for D; the causal form
    then has no H̄ and no R' term, for a constant has no future part.

    Args:
        sums: a table with first- and second-order columns, [S] float64.
        estimator: "exact" or "causal".
        per: "token" or "sequence".
        prompts: "random" or "fixed", see `clustered_stderr`.
        first: the slope of that estimator of this table where it is there already, with the same `per` and `prompts`.

    Returns:
        Estimate in nats per token (or per sequence) per unit of η². Its parts add up to value: score (the second
        derivative of the weights), cross (their first), pathwise (from H''); part_stderrs has their errors.

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
    check_choice("estimator", estimator, ESTIMATORS)
    ratio = entropy_ratio(sums, per, FORM[estimator])
    groups, table = Groups.of(sums.group, prompts, ratio.size), ratio.table
    d2logp, d2entropy = column(table, "d2logp"), column(table, "d2entropy")
    dlogp, dentropy = column(table, "dlogp"), column(table, "dentropy")
    if first is None:
        first = slope(sums, estimator=estimator, per=per, prompts=prompts)
    check_estimate("first", first, "slope", estimator=estimator)
    check_same_rollouts("first", first, groups, per)
    total = ratio.total

    # dsize and d2size are what a rollout adds to the derivatives of the denominator Σ w_i T_i.
    if estimator == "exact":
        q = dlogp**2 + d2logp
        dsize, d2size, score, cross = ratio.size * dlogp, ratio.size * q, ratio.entropy * q, 2 * dlogp * dentropy
    else:
        dsize, d2size = column(table, "length_to_go"), column(table, "length_to_go_2")
        if per == "sequence":
            dsize = d2size = np.zeros_like(dlogp)
        score, cross = column(table, "entropy_to_go_2"), 2 * column(table, "dentropy_to_go")
    score = score - ratio.mean * d2size
    # without R': its ratio is another one when a group is left out
    without_slope = score + cross + d2entropy
    along = ratio.influence(cross, np.zeros_like(dsize)) - 2 * dsize.sum() / total * first.influence
    along -= 2 * first.value * ratio.influence(dsize, np.zeros_like(dsize))
    cross = cross - 2 * first.value * dsize
    terms = score + cross + d2entropy
    influence = {
        "score": ratio.influence(score, d2size),
        "cross": along,
        "pathwise": ratio.influence(d2entropy, np.zeros_like(dsize)),
    }
    totals = [ratio.size, ratio.centred, first.contributions * total, dsize, without_slope, d2size]
    return Estimate.of(
        terms.sum() / total,
        sum(influence.values()),
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
        part_stderrs={name: groups.stderr(psi)[0] for name, psi in influence.items()},
        name="curvature",
        estimator=estimator,
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
