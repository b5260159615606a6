"""The measurement ΔH(η): the change of entropy between two weight settings, by importance sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import check_choice, column, entropy_ratio
from dentropy.estimators.estimate import Statistic
from dentropy.estimators.groups import Groups
from dentropy.estimators.jackknife import leave_one_out
from dentropy.estimators.prefix_weights import check_reach, prefix_weights
from dentropy.estimators.reweighting import as_drawn

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

WEIGHTS = ("sequence", "prefix")
_QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ImportanceResult(Statistic):
    """A measured change of entropy, in nats per token (nats per sequence with per="sequence").

    The fields of `Statistic`, whose value is ΔH = moved_value − base_value, also under the name delta, and:

    base_value            H̄, the entropy at the base weights
    moved_value           R, the entropy at the moved weights, by importance weighting
    n                     S, the number of rollouts
    ess, ess_fraction     effective sample size (Σw)²/Σw², and as a fraction of the S rollouts
    ess_tokens            the same of w_i·T_i: what the denominator of the entropy per token rests on
    max_weight            the largest weight's share, max w / Σ w
    mean_weight           mean of w, 1 in expectation on rollouts of the base policy; inf where it overflows
    log_weight_quantiles  log w in nats: min, p05, p25, median, p75, p95, max
    log_weights           float64 [S], L_i(η) − L_i(0), in the row order of the base table; of rollouts of another
                          sampler its log-probability takes the place of L_i(0), here and in all that follows
    contributions         float64 [S], one per rollout; they sum to delta
    moved_entropy         float64 [S], H_i(η)
    size                  float64 [S], T_i (1 with per="sequence")
    weights               "sequence" or "prefix"
    worst_position        None, or with prefix weights the token position, from 1, whose weights w_{<j} have the
                          smallest effective sample size for their number, of those where 95% of the tokens are
    worst_ess_fraction    that size as a fraction of the rollouts which have the position

    Prefix weights have another weight for each token. There log_weights, and what follows from them, are of w_i = M_i,
    the mean over positions of the rollout's weight up to there, its last where it has ended (1 in expectation, as a
    sequence weight is), and moved_entropy and size are what makes w_i·H_i = Σ_j w_{<j} h_j(η) and
    w_i·T_i = Σ_j w_{<j}: the products, whose tails k̂ is about, are the terms of the two sums.
    """

    base_value: float
    moved_value: float
    ess: float
    ess_tokens: float
    max_weight: float
    mean_weight: float
    log_weight_quantiles: dict[str, float]
    log_weights: np.ndarray
    contributions: np.ndarray
    moved_entropy: np.ndarray
    size: np.ndarray
    weights: str
    worst_position: int | None
    worst_ess_fraction: float | None

    def _shown(self) -> tuple[str, ...]:
        return "ΔH", f"nats per {self.per}", f"{self.weights} weights", f"ESS {self.ess_fraction:.1%}"

    @property
    def delta(self) -> float:
        """ΔH, the value."""
        return self.value

    @property
    def n(self) -> int:
        return self.size.size

    @property
    def ess_fraction(self) -> float:
        return self.ess / self.n


def importance(
    base: SequenceSums, moved: SequenceSums, *, weights: str = "sequence", per: str = "token", prompts: str = "random"
) -> ImportanceResult:
    """ΔH between two weight settings from rollouts of the first, by self-normalized importance sampling.

    With H̄ = Σ H_i(0) / Σ T_i, ΔH = R − H̄ where

        "sequence"   R = Σ_i w_i H_i(η) / Σ_i w_i T_i ,                w_i = exp(L_i(η) − L_i(0))
        "prefix"     R = Σ_i Σ_j w_{<j} h_j(η) / Σ_i Σ_j w_{<j} ,      w_{<j} = exp Σ_{k<j} (logp_k(η) − logp_k(0))

    Both have the same limit. Prefix weights leave out what comes after a token, which adds noise alone: the longer the
    rollouts, the fewer of them they need. Their derivative is the causal slope, as that of sequence weights is the
    exact one, so that each measurement has the smallest error beside the prediction of its own form. ΔH is the sum of

        c_i = w_i (H_i(η) − H̄ T_i) / Σ_j w_j T_j − (H_i(0) − H̄ T_i) / Σ_j T_j ,

    which are to first order η times the contributions of the exact slope, but for a term that sums to 0 (the
    common denominator moves), or with the two sums over j for w_i H_i(η) and w_i T_i those of the causal slope. The
    influence values have R for the first H̄. per="sequence" puts 1 for T_i, and for the denominator of prefix weights:
    nothing comes before a rollout. Of rollouts of another sampler the weights are those from it, and H̄ is an estimate
    with base weights as well.

    Args:
        base, moved: tables of the same rollouts, scored at the two weight settings, [S] float64; rows are
            paired by `rollout`, so their order may differ. Prefix weights need the kept tokens of both.
        weights: "sequence" or "prefix".
        per: "token" or "sequence".
        prompts: "random" or "fixed", see `clustered_stderr`.

    Returns:
        ImportanceResult in nats per token (or per sequence).

    Raises:
        ValueError: an unknown choice; no rollout or no token at all; a value that is not finite, another set
            of rollouts, a rollout that occurs twice, or one whose n_tokens or group differ (each names the
            rollout); weights that vanish on every rollout that has tokens; with prefix weights, tables without
            tokens and, for per="sequence", weights beyond e^300.

    Example:
        >>> import torch
        >>> from dentropy import importance, sequence_sums, token_stats
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
        >>> targets, ends = torch.tensor([1, 4, 0, 2, 2, 0]), torch.tensor([0, 3, 4, 6])
        >>> base = sequence_sums(token_stats(logits, targets), ends)
        >>> moved = sequence_sums(token_stats(logits + 0.1 * dlogits, targets), ends)
        >>> result = importance(base, moved)
        >>> abs(result.moved_value - result.base_value - result.delta) < 1e-12
        True
    """
    check_choice("weights", weights, WEIGHTS)
    ratio = entropy_ratio(base, per, weights, "base")
    groups = Groups.of(base.group, prompts, ratio.size)
    rows = paired_rows(base, moved)
    moved_entropy = column(moved, "entropy", "moved")[rows]
    log_weights = column(moved, "logp", "moved")[rows] - column(as_drawn(base), "logp", "base")
    moved_tokens, worst = column(base, "n_tokens", "base"), (None, None)
    moved_size = moved_tokens if per == "token" else np.ones_like(moved_tokens)
    if weights == "prefix":
        log_weights, moved_entropy, moved_tokens, *worst = prefix_weights(base, moved, rows)
        moved_size = moved_tokens
        if per == "sequence":
            check_reach(log_weights, base.rollout)
            moved_size = np.exp(-log_weights)

    # Ratios do not know a common factor of the weights: with 1 for the largest, none overflows.
    scaled = np.exp(log_weights - log_weights.max())
    weighted_total = np.sum(scaled * moved_size)
    if weighted_total == 0:
        raise ValueError(
            "moved.logp: so far below base.logp that the weight of every rollout with tokens vanishes beside "
            "the empty rollouts', expected a move small enough to measure by importance sampling"
        )
    moved_value = np.sum(scaled * moved_entropy) / weighted_total
    moved_centred, base_term = scaled * (moved_entropy - ratio.mean * moved_size), ratio.centred / ratio.total
    contributions = moved_centred / weighted_total - base_term
    influence = scaled * (moved_entropy - moved_value * moved_size) / weighted_total - base_term
    totals = [scaled * moved_size, ratio.size, moved_centred, ratio.centred]
    return ImportanceResult.of(
        contributions.sum(),
        influence,
        leave_one_out(_ratio_change, totals, 2, groups),
        groups,
        doubts=ratio.doubts,
        per=per,
        base_value=float(ratio.mean),
        moved_value=float(moved_value),
        ess=_effective_sample_size(scaled),
        ess_tokens=_effective_sample_size(scaled * moved_tokens),
        max_weight=float(scaled.max() / scaled.sum()),
        mean_weight=_mean_weight(log_weights),
        log_weight_quantiles=_quantiles(log_weights),
        log_weights=log_weights,
        contributions=contributions,
        moved_entropy=moved_entropy,
        size=moved_size,
        weights=weights,
        worst_position=worst[0],
        worst_ess_fraction=worst[1],
    )


def _ratio_change(
    moved_size: np.ndarray, size: np.ndarray, moved_entropy: np.ndarray, entropy: np.ndarray
) -> np.ndarray:
    """ΔH of a set of rollouts from its totals Σ w T, Σ T, Σ w (H(η) − c T), Σ (H(0) − c T), for any c."""
    return moved_entropy / moved_size - entropy / size


def _quantiles(log_weights: np.ndarray) -> dict[str, float]:
    values = np.quantile(log_weights, list(_QUANTILES.values()))
    return dict(zip(_QUANTILES, values.tolist(), strict=True))


def _mean_weight(log_weights: np.ndarray) -> float:
    # Past the range of float64 it is inf, which says what is to be said: no warning on top.
    with np.errstate(over="ignore"):
        return float(np.mean(np.exp(log_weights)))


def _effective_sample_size(weights: np.ndarray) -> float:
    scaled = weights / weights.max()  # squares of tiny weights would underflow
    return float(scaled.sum() ** 2 / np.sum(scaled**2))


def paired_rows(base: SequenceSums, moved: SequenceSums) -> np.ndarray:
    """Row of `moved` for each row of `base`, int64 [S]; ValueError where these are not the same rollouts."""
    for argument, sums in (("base", base), ("moved", moved)):
        labels, counts = np.unique(sums.rollout, return_counts=True)
        if counts.max(initial=1) > 1:
            twice = int(labels[counts > 1][0])
            raise ValueError(f"{argument}.rollout: {twice} occurs more than once, expected every rollout once")
    differ = np.setxor1d(base.rollout, moved.rollout)
    if differ.size:
        place = "moved" if differ[0] in np.asarray(base.rollout) else "base"
        raise ValueError(f"{place}: rollout {differ[0]} is missing, expected the same rollouts in base and moved")
    rows = np.empty(len(base.rollout), dtype=np.int64)
    rows[np.argsort(base.rollout)] = np.argsort(moved.rollout)
    drawn = [sums.sampler_logp for sums in (base, moved)]
    if (drawn[0] is None) != (drawn[1] is None) or (drawn[0] is not None and (drawn[0] != drawn[1][rows]).any()):
        raise ValueError("moved.sampler_logp: not that of base, expected the same rollouts of the same sampler")
    for name in ("n_tokens", "group"):
        values, others = np.asarray(getattr(base, name)), np.asarray(getattr(moved, name))[rows]
        if not np.array_equal(values, others):
            row = int(np.argmax(values != others))
            raise ValueError(
                f"moved.{name}: {int(others[row])} for rollout {int(base.rollout[row])}, "
                f"expected {int(values[row])} as in base"
            )
    return rows
