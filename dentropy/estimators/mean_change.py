"""Changes of means: what scores and baselines are, and how a sum over rollouts becomes a value with its errors.

The change of a mean is a mean of something times a score: dlogp_k for a slope, w_{<k}(ρ_k − 1) at η, whose derivative
that is. Over a rollout the scores add up to ℓ'_i and to w_i − 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import entropy_ratio
from dentropy.estimators.estimate import Statistic
from dentropy.estimators.groups import Groups
from dentropy.estimators.importance_sampling import paired_rows
from dentropy.estimators.jackknife import leave_one_out
from dentropy.estimators.prefix_weights import TokenRatios, check_reach, token_ratios
from dentropy.estimators.reweighting import sequence_weights
from dentropy.estimators.tokens import KeptTokens
from dentropy.stats.segments import segment_sum

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
    """Scores of the tokens of S rollouts, packed in the row order of the base table.

    token    float64 [N], dlogp_k or w_{<k}(ρ_k − 1)
    rollout  float64 [S], their sums: ℓ'_i or w_i − 1
    linear   whether they are derivatives
    """

    token: np.ndarray
    rollout: np.ndarray
    linear: bool


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The rollouts of a base table with kept tokens, and their scores: all that the change of a mean is made of.

    tokens  the kept tokens of the base table
    prompts "random" or "fixed"
    group   int64 [S]
    weight  float64 [S], 1; of rollouts of another sampler W_i, see `sequence_weights`
    doubts  why no error bar of this table is to be trusted, see `EntropyRatio`
    first   the scores of the slope
    ratios  by η
    at      by η: the scores there
    """

    tokens: KeptTokens
    prompts: str
    group: np.ndarray
    weight: np.ndarray
    doubts: tuple[str, ...]
    first: Scores
    ratios: dict[float, TokenRatios]
    at: dict[float, Scores]

    @classmethod
    def of(cls, base: SequenceSums, moved: dict[float, SequenceSums], prompts: str) -> Rollouts:
        """ValueError for tables that have no tokens, do not pair, or hold a value that is not finite."""
        doubts, tokens = entropy_ratio(base, "token", "sequence", "base").doubts, KeptTokens.of(base, "sequence")
        ratios = {eta: token_ratios(base, table, paired_rows(base, table)) for eta, table in moved.items()}
        for found in ratios.values():
            check_reach(found.reach, base.rollout)
        at = {}
        for eta, found in ratios.items():
            score = np.exp(found.before) * np.expm1(found.log_ratio)
            # The sum telescopes to w − 1, which keeps its digits where the terms cancel.
            at[eta] = Scores(score, np.expm1(segment_sum(found.log_ratio, found.ends)), linear=False)
        first = Scores(tokens.dlogp, tokens.per_rollout(tokens.dlogp), linear=True)
        return cls(tokens, prompts, np.asarray(base.group), sequence_weights(base), doubts, first, ratios, at)

    def weighted_mean(self, values: np.ndarray) -> float:
        """Σ W_i x_i / Σ W_i of `values` [S]: their mean over rollouts of the policy."""
        return float(np.sum(self.weight * values) / self.weight.sum())

    def mean_of_others(
        self, own: np.ndarray, of_group: np.ndarray, of_all: np.ndarray, row: np.ndarray | slice = slice(None)
    ) -> np.ndarray:
        """The baseline of each rollout or token: the mean of the other rollouts of the prompt, with their weights W_j.

        A rollout that is its prompt's only one takes the mean of all others. It leaves every expectation as it is, for
        a baseline may depend on anything but the rollout's own tokens from here on.

        Args:
            own, of_group, of_all: what is averaged, W_i times, of the rollout itself, summed over its prompt, and over
                all.
            row: the rollout that each is of.
        """
        groups = self.groups()
        alone = (groups.members == 1)[groups.row][row]
        others = np.where(alone, of_all, of_group) - own
        rest = np.where(alone, self.weight.sum(), groups.sums(self.weight)[groups.row][row]) - self.weight[row]
        return others / np.where(rest > 0, rest, 1.0)

    def groups(self, size: np.ndarray | None = None) -> Groups:
        """The prompt groups of rollouts that count for `size` [S] (None: 1 each)."""
        return Groups.of(self.group, self.prompts, size)


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
