"""Changes of means: what scores and baselines are, and how a sum over rollouts becomes a value with its errors.

The change of a mean is a mean of something times a score: dlogp_k for a slope, w_{<k}(ρ_k − 1) at η, whose derivative
that is. Over a rollout the scores add up to ℓ'_i and to w_i − 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.baselines import Others, TokensLeft
from dentropy.estimators.columns import column, entropy_ratio
from dentropy.estimators.estimate import Statistic
from dentropy.estimators.groups import Groups
from dentropy.estimators.importance_sampling import paired_rows
from dentropy.estimators.jackknife import leave_one_out
from dentropy.estimators.prefix_weights import check_reach, token_ratios
from dentropy.estimators.reweighting import sequence_weights
from dentropy.estimators.tokens import KeptTokens, lengths
from dentropy.stats.segments import place_in_sequence, segment_sum

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums


@dataclass(frozen=True, eq=False, kw_only=True)
class MeanChange:
    """What a step does to one number: its value now, the slope, and the change at each η that was measured.

    base     the number at the base weights
    slope    its derivative d/dη at η = 0
    changes  by η: what it is there less `base`
    """

    base: float
    slope: Statistic
    changes: dict[float, Statistic] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of the tokens of S rollouts, dlogp_k or w_{<k}(ρ_k − 1), summed over each, in the base table's row order.

    rollout     float64 [S], their sums: ℓ'_i or w_i − 1
    length      float64 [S], Σ_k (T_i − k − b_k) times the score of token k, see `length_forecast`
    divergence  float64 [S], Σ_k (ρ_k − 1 − log ρ_k); None for derivatives
    """

    rollout: np.ndarray
    length: np.ndarray
    divergence: np.ndarray | None = None

    @property
    def linear(self) -> bool:
        """Whether they are derivatives."""
        return self.divergence is None


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The rollouts of a base table with kept tokens, and their scores: all that the change of a mean is made of.

    n_tokens float64 [S], T_i
    prompts  "random" or "fixed"
    group    int64 [S]
    weight   float64 [S], 1; of rollouts of another sampler W_i, see `sequence_weights`
    doubts   why no error bar of this table is to be trusted, see `EntropyRatio`
    first    the scores of the slope
    at       by η: the scores there
    """

    n_tokens: np.ndarray
    prompts: str
    group: np.ndarray
    weight: np.ndarray
    doubts: tuple[str, ...]
    first: Scores
    at: dict[float, Scores]

    @classmethod
    def of(cls, base: SequenceSums, moved: dict[float, SequenceSums], prompts: str) -> Rollouts:
        """ValueError for tables that have no tokens, do not pair, or hold a value that is not finite."""
        doubts, weight = entropy_ratio(base, "token", "sequence", "base").doubts, sequence_weights(base)
        left = Others(Groups.of(base.group, prompts), weight).tokens_left(lengths(base))
        first = Scores(*_joined(_first_scores(base, left)))
        at = {eta: Scores(*_joined(_scores(base, table, left))) for eta, table in moved.items()}
        return cls(column(base, "n_tokens"), prompts, np.asarray(base.group), weight, doubts, first, at)

    def weighted_mean(self, values: np.ndarray) -> float:
        """Σ W_i x_i / Σ W_i of `values` [S]: their mean over rollouts of the policy."""
        return float(np.sum(self.weight * values) / self.weight.sum())

    def others(self) -> Others:
        """The baselines that the others of a prompt give."""
        return Others(self.groups(), self.weight)

    def groups(self, size: np.ndarray | None = None) -> Groups:
        """The prompt groups of rollouts that count for `size` [S] (None: 1 each)."""
        return Groups.of(self.group, self.prompts, size)


def _first_scores(base: SequenceSums, left: TokensLeft) -> Iterator[tuple[np.ndarray, ...]]:
    """(rollout, length) of `Scores`, for some rows at a time."""
    for rows, tokens in KeptTokens.pieces(base, "sequence"):
        behind = left.at(tokens.row + rows.start, tokens.position)
        yield tokens.per_rollout(tokens.dlogp), tokens.per_rollout(tokens.dlogp * behind)


def _scores(base: SequenceSums, moved: SequenceSums, left: TokensLeft) -> Iterator[tuple[np.ndarray, ...]]:
    """(rollout, length, divergence) of `Scores` at an η, for some rows at a time."""
    for rows, _, found in token_ratios(base, moved, paired_rows(base, moved)):
        check_reach(found.reach, base.rollout[rows])
        score, ends = np.exp(found.before) * np.expm1(found.log_ratio), found.ends
        row = np.repeat(np.arange(rows.start, rows.stop), np.diff(ends))
        length = segment_sum(score * left.at(row, 1 + place_in_sequence(ends)), ends)
        # The sum of the scores telescopes to w − 1, which keeps its digits where the terms cancel.
        rollout = np.expm1(segment_sum(found.log_ratio, ends))
        yield rollout, length, segment_sum(np.expm1(found.log_ratio) - found.log_ratio, ends)


def _joined(parts: Iterable[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def ratio_of_sums(
    terms: np.ndarray,
    size: np.ndarray,
    rollouts: Rollouts,
    *,
    doubts: tuple[str, ...] = (),
    per: str = "sequence",
    kind: type[Statistic] = Statistic,
) -> Statistic:
    """s = Σ x_i / Σ n_i with ψ_i = (x_i − s n_i) / Σ n: a mean over rollouts, prompts or tokens by what n_i is.

    Of rollouts of another sampler both x_i and n_i are taken W_i times.

    Args:
        terms: [S], x_i.
        size: [S], n_i: 1 for a mean over rollouts, 1 over the rollouts of its prompt for one over prompts.
        rollouts: those they are of.
        doubts: warnings to add.
        per: "token" where the size is in tokens.
        kind: of statistic.
    """
    terms, size = rollouts.weight * terms, rollouts.weight * size
    groups, total = rollouts.groups(size), size.sum()
    value = terms.sum() / total
    return kind.of(
        value,
        (terms - value * size) / total,
        leave_one_out(lambda size, terms: terms / size, [size, terms], 1, groups),
        groups,
        doubts=rollouts.doubts + doubts,
        per=per,
    )
