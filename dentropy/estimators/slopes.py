"""The slope R'(0): how fast the policy's entropy changes along a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import check_choice, column, entropy_ratio
from dentropy.estimators.estimate import Estimate
from dentropy.estimators.groups import Groups
from dentropy.estimators.jackknife import leave_one_out
from dentropy.estimators.reweighting import FORM, score_weights
from dentropy.estimators.tokens import KeptTokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from dentropy.stats.tables import SequenceSums

ESTIMATORS = ("causal", "exact", "mixed")
BASELINES = ("none", "entropy")


def slope(
    sums: SequenceSums,
    *,
    estimator: str = "causal",
    per: str = "token",
    baseline: str | ArrayLike = "entropy",
    prompts: str = "random",
    horizon: int | None = None,
) -> Estimate:
    """Slope at η = 0 of the entropy R(η) = Σ w_i H_i / Σ w_i T_i, w_i = exp(L_i(η) − L_i(0)), from one pass.

    Rollout i has T_i tokens, D = Σ T_i, H̄ = Σ H_i / D; a prime is d/dη. The slope is Σ_i x_i / D with

        "causal"   x_i = H'_i + Σ_k dlogp_k Σ_{j>k} (h_j − H̄)          lowest variance per token
        "exact"    x_i = H'_i + (H_i − H̄ T_i) ℓ'_i                     the derivative of `importance` here
        "mixed"    x_i = H'_i + Σ_k (G_k − b_k) dlogp_k − H̄ T_i ℓ'_i   REINFORCE, G_k = Σ_{j≥k} h_j

    per="sequence" is R = Σ w_i H_i / Σ w_i: T_i becomes 1 and D becomes S; the causal form then has no H̄
    term, for a constant has no future part. All three have the same limit; their ratio bias is of order 1/S.

    Args:
        sums: a table with tangent columns, [S] float64.
        estimator, per: as above.
        baseline: b_k of "mixed" and of the uncorrected value: "none" (0), "entropy" (h_k), or an array
            [total tokens] in nats, packed in row order, which needs the table's kept tokens; b_k must not
            depend on the token at k or on anything later.
        prompts: "random" or "fixed", see `clustered_stderr`.
        horizon: with n, the causal sum over later tokens ends n tokens after k: less noise, for a bias that the part
            left_out estimates. To be read beside the slope without one. Needs the table's kept tokens.

    Returns:
        Estimate in nats per token (or per sequence) per unit of η. Its parts pathwise (from H': the same contexts)
        and other_answers add up to value. The latter is the sum of score (from the score function) and
        length_correction (the H̄ term), large numbers that cancel; uncorrected is "mixed" without its last term;
        with a horizon, left_out is what the full causal slope has more. part_stderrs has their errors.

    Raises:
        ValueError: an unknown choice, no tangent columns, no rollout or no token at all, a value that is not
            finite (the rollout is named), a baseline of another length or without kept tokens; a horizon that is
            negative, with another estimator, or without kept tokens.

    Example:
        >>> import torch
        >>> from dentropy import sequence_sums, slope, token_stats
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits)
        >>> estimate = slope(sequence_sums(stats, torch.tensor([0, 3, 4, 6])))
        >>> parts = estimate.parts
        >>> abs(parts["pathwise"] + parts["score"] + parts["length_correction"] - estimate.value) < 1e-12
        True
    """
    check_choice("estimator", estimator, ESTIMATORS)
    if isinstance(baseline, str):
        check_choice("baseline", baseline, BASELINES)
    if horizon is not None:
        _check_horizon(horizon, estimator)
    ratio = entropy_ratio(sums, per, FORM[estimator])
    groups, table = Groups.of(sums.group, prompts, ratio.size), ratio.table
    dlogp, dentropy = column(table, "dlogp"), column(table, "dentropy")

    # dsize is what a rollout adds to the derivative of the denominator Σ w_i T_i.
    score = reinforce = _reinforce_score(table, sums, baseline, FORM[estimator])
    dsize = ratio.size * dlogp
    if estimator == "exact":
        score = ratio.entropy * dlogp
    elif estimator == "causal":
        score, dsize = _causal_score(table, sums, per, horizon)

    none, other = np.zeros_like(dlogp), score - ratio.mean * dsize
    parts = {  # terms and what they hold of −H̄, [S] each
        "pathwise": (dentropy, none),
        "other_answers": (other, dsize),
        "score": (score, none),
        "length_correction": (-ratio.mean * dsize, dsize),
        "uncorrected": (dentropy + reinforce, none),
    }
    if horizon is not None:
        full, full_dsize = _causal_score(table, sums, per)
        parts["left_out"] = full - ratio.mean * full_dsize - other, full_dsize - dsize
    terms = dentropy + other
    return Estimate.of(
        terms.sum() / ratio.total,
        ratio.influence(terms, dsize),
        leave_one_out(ratio_slope, [ratio.size, ratio.centred, terms, dsize], 1, groups),
        groups,
        doubts=ratio.doubts,
        per=per,
        contributions=terms / ratio.total,
        parts={name: float(part.sum() / ratio.total) for name, (part, _) in parts.items()},
        part_stderrs={name: groups.stderr(ratio.influence(*part))[0] for name, part in parts.items()},
        name="slope",
        estimator=estimator,
    )


def ratio_slope(size: np.ndarray, entropy: np.ndarray, terms: np.ndarray, dsize: np.ndarray) -> np.ndarray:
    """The slope of a set of rollouts from its totals: Σ T, Σ (H − c T), Σ x, Σ dT, x with c for its H̄.

    It is the same for every c; the batch's own H̄ keeps the numbers small.
    """
    return (terms - entropy / size * dsize) / size


def _causal_score(
    table: SequenceSums, sums: SequenceSums, per: str, horizon: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(Σ_k dlogp_k Σ_{j>k} h_j, Σ_k dlogp_k (T − k), 0 per sequence) of each rollout, up to j = k + horizon."""
    if horizon is None:
        score, dsize = column(table, "entropy_to_go"), column(table, "length_to_go")
    else:
        found = [
            [tokens.per_rollout(tokens.dlogp * later) for later in tokens.between(1, horizon)]
            for _, tokens in KeptTokens.pieces(sums, FORM["causal"])
        ]
        score, dsize = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return score, dsize if per == "token" else np.zeros_like(dsize)


def _check_horizon(horizon: int, estimator: str) -> None:
    if not isinstance(horizon, int | np.integer) or horizon < 0:
        raise ValueError(f"horizon: {horizon!r}, expected a number of tokens")
    if estimator != "causal":
        raise ValueError(f"horizon: {horizon} with estimator={estimator!r}, expected the causal one")


def _reinforce_score(table: SequenceSums, sums: SequenceSums, baseline: str | ArrayLike, weights: str) -> np.ndarray:
    """Σ_k (G_k − b_k) dlogp_k of each rollout, G_k = Σ_{j≥k} h_j: float64 [S], in nats per unit of η."""
    # Σ_k (G_k − h_k) dlogp_k is the entropy_to_go column itself.
    score = column(table, "entropy_to_go")
    if isinstance(baseline, str) and baseline == "entropy":
        return score
    score = score + column(table, "entropy_dlogp")
    if isinstance(baseline, str):
        return score
    if sums.tokens is None:
        raise ValueError("baseline: an array for a table without tokens, expected one measured with keep_tokens=True")
    values = np.asarray(baseline, dtype=np.float64)
    n_tokens = np.asarray(sums.n_tokens).astype(np.int64)
    total = int(n_tokens.sum())
    if values.shape != (total,):
        raise ValueError(f"baseline: shape {values.shape}, expected ({total},): one value per token")
    finite = np.isfinite(values)
    if not finite.all():
        token = int(np.argmin(finite))
        raise ValueError(f"baseline: {values[token]} at token {token}, expected finite values")
    row = np.repeat(np.arange(n_tokens.size), n_tokens)
    weighted = values * score_weights(sums, weights) * np.asarray(sums.tokens.dlogp, dtype=np.float64)
    return score - np.bincount(row, weights=weighted, minlength=n_tokens.size)
