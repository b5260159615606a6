"""Prompt groups: how rollouts that answer one prompt hang together, and what that makes of an error.

Whether the prompts of a table were drawn at random or are the very ones that matter is decided here alone: by the
class that `Groups.of` returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dentropy.estimators.columns import check_choice


def clustered_stderr(
    influence: np.ndarray, group: np.ndarray, prompts: str = "random"
) -> tuple[float | None, str | None]:
    """Standard error of an estimate from its influence values (the delta method), clustered by prompt group.

    With G groups g of m_g rollouts and influence values ψ_i [S]:

        "random"   sqrt( G/(G−1) · Σ_g (Σ_{i∈g} ψ_i)² )                  prompts drawn at random
        "fixed"    sqrt( Σ_g m_g/(m_g−1) · Σ_{i∈g} (ψ_i − mean_g ψ)² )   these very prompts, answers redrawn

    On a fixed set of prompts the first form is conservative. Intervals are value ± t·stderr, t with G' − 1 degrees of
    freedom ("random"; G' = (Σ T_g)² / Σ T_g², T_g the tokens of a group, is G for equal groups; no less than 2 is
    taken) or S − G, or those of `degrees_by_spread` where these are fewer ("fixed").

    Args:
        influence: [S] float, in the estimate's units.
        group: [S] int, the prompt group of each rollout.
        prompts: "random" or "fixed".

    Returns:
        (stderr, None), or (None, reason) where the groups do not allow a standard error: one group only ("random"),
        a group of one rollout ("fixed").

    Raises:
        ValueError: an unknown `prompts`, an `influence` that is empty or not one-dimensional, a `group` of another
            shape.

    Example:
        >>> import numpy as np
        >>> from dentropy.estimators import clustered_stderr
        >>> clustered_stderr(np.array([1.0, 1.0, -1.0, -1.0]), np.array([0, 0, 1, 1]))
        (4.0, None)
        >>> clustered_stderr(np.array([0.5, -0.5]), np.array([7, 7]))
        (None, "all 2 rollouts are in one group; prompts='random' needs two groups or more")
    """
    influence = np.asarray(influence, dtype=np.float64)
    if influence.ndim != 1 or influence.size == 0:
        raise ValueError(f"influence: shape {influence.shape}, expected [S] with S of at least 1")
    if np.shape(group) != influence.shape:
        raise ValueError(f"group: shape {np.shape(group)}, expected {influence.shape} as influence has")
    return Groups.of(group, prompts).stderr(influence)


def degrees_by_spread(terms: np.ndarray) -> float:
    """2 / (Σ t² / (Σ t)² − 1/n), the degrees of freedom of a χ² that varies as the sum of these n terms does.

    At least 1; inf for equal terms. Squares of n normal values have about n, of values with heavier tails fewer.

    Example:
        >>> import numpy as np
        >>> degrees_by_spread(np.array([2.0, 0.0, 0.0, 0.0]))    # one of four makes it all
        2.6666666666666665
    """
    mean = terms.mean()
    variance = np.mean((terms - mean) ** 2)
    return math.inf if variance == 0 else max(1.0, float(2 * terms.size * mean**2 / variance))


@dataclass(frozen=True, eq=False, repr=False)
class Groups:
    """The prompt groups of a table, and whether its prompts are "random" or "fixed".

    labels   int64 [G], sorted
    row      int64 [S], each rollout's group, an index into labels
    members  int64 [G], rollouts in each
    weight   float64 [G], tokens in each (per="sequence": rollouts)

    A unit is what an error is made of: a group of random prompts, a rollout of fixed ones. Both kinds know

    refusal()            why these groups allow no standard error, in words; None where they do
    dof                  degrees of freedom of the standard error of normal values
    degrees(terms)       those of one whose square is the sum of these terms
    variance_terms(ψ)    terms, one per unit, whose sum is the squared standard error of influence values ψ [S]
    rest(values)         the sum of values [S] with each unit left out, one per unit
    jackknife_stderr(θ)  standard error from the statistic with each unit left out
    unit(index), count   a unit and their number, in words
    needed(factor)       (rollouts, groups) with which the squared standard error is `factor` times smaller
    """

    labels: np.ndarray
    row: np.ndarray
    members: np.ndarray
    weight: np.ndarray
    prompts: ClassVar[str]

    @staticmethod
    def of(group: np.ndarray, prompts: str = "random", size: np.ndarray | None = None) -> RandomPrompts | FixedPrompts:
        """The groups of rollouts labelled `group` [S], of `size` [S] (None: 1); ValueError for an unknown `prompts`."""
        check_choice("prompts", prompts, tuple(_KINDS))
        labels, row, members = np.unique(group, return_inverse=True, return_counts=True)
        return _KINDS[prompts](labels, row, members, np.bincount(row, weights=size))

    @staticmethod
    def of_two(first: np.ndarray, second: np.ndarray, prompts: str) -> RandomPrompts | FixedPrompts:
        """The groups of two samples for the same prompts: the rollouts labelled `first`, then those labelled `second`.

        Random prompts pair the two. On fixed ones a prompt's answers in either sample vary around a mean of their own.
        """
        apart = first.max() - second.min() + 1 if prompts == FixedPrompts.prompts else 0
        return Groups.of(np.concatenate([first, second + apart]), prompts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.row.size} rollouts in {self.labels.size} groups)"

    @property
    def group(self) -> np.ndarray:
        """The label of each rollout, int64 [S]."""
        return self.labels[self.row]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums of `values` [S] over each group, [G]."""
        return np.bincount(self.row, weights=values, minlength=self.labels.size)

    def around_means(self, values: np.ndarray) -> np.ndarray:
        """`values` [S] less the mean of their group."""
        return values - (self.sums(values) / self.members)[self.row]

    def stderr(self, influence: np.ndarray) -> tuple[float | None, str | None]:
        """What `clustered_stderr` returns."""
        reason = self.refusal()
        if reason is not None:
            return None, reason
        return float(np.sqrt(self.variance_terms(influence).sum())), None


class RandomPrompts(Groups):
    """Prompts drawn at random: the groups vary, each as a whole."""

    prompts = "random"

    def refusal(self) -> str | None:
        if self.labels.size > 1:
            return None
        count = f"all {self.row.size} rollouts are" if self.row.size > 1 else "the only rollout is"
        return f"{count} in one group; prompts='random' needs two groups or more"

    @property
    def dof(self) -> float:
        """G' − 1: of so many groups of one size as vary like these, where a large one counts for more."""
        return max(1.0, float(self.weight.sum() ** 2 / np.sum(self.weight**2)) - 1)

    def degrees(self, terms: np.ndarray) -> float:
        """Those of normal values: sums over the rollouts of a prompt are nearly that."""
        return self.dof

    def variance_terms(self, influence: np.ndarray) -> np.ndarray:
        count = self.labels.size
        return count / (count - 1) * self.sums(influence) ** 2

    def rest(self, values: np.ndarray) -> np.ndarray:
        """A − A_g for the total A."""
        return values.sum() - self.sums(values)

    def jackknife_stderr(self, left_out: np.ndarray) -> float:
        """sqrt((G−1)/G · Σ_g (θ_g − θ̄)²)."""
        count = self.labels.size
        return float(np.sqrt((count - 1) / count * np.sum((left_out - left_out.mean()) ** 2)))

    def unit(self, index: int) -> str:
        return f"group {int(self.labels[index])}"

    @property
    def count(self) -> str:
        return f"{self.labels.size} groups"

    def needed(self, factor: float) -> tuple[int, int]:
        """Groups times `factor`, each of as many rollouts as now."""
        groups = max(2, math.ceil(self.labels.size * factor))
        return math.ceil(groups * self.row.size / self.labels.size), groups


class FixedPrompts(Groups):
    """These very prompts: the rollouts of each vary around its mean, which is estimated."""

    prompts = "fixed"

    def refusal(self) -> str | None:
        if self.members.min() > 1:
            return None
        alone = self.labels[self.members == 1]
        return (
            f"group {int(alone[0])} has one rollout ({alone.size} of {self.labels.size} groups do); "
            "prompts='fixed' needs two or more in every group"
        )

    @property
    def dof(self) -> float:
        return float(self.row.size - self.labels.size)

    def degrees(self, terms: np.ndarray) -> float:
        """As single rollouts vary, which are far from normal."""
        return min(self.dof, degrees_by_spread(terms))

    def variance_terms(self, influence: np.ndarray) -> np.ndarray:
        return (self.members / (self.members - 1))[self.row] * self.around_means(influence) ** 2

    def rest(self, values: np.ndarray) -> np.ndarray:
        """A + (A_g − m_g a_i) / (m_g − 1): the others of a prompt stand for rollout i, and it keeps its weight."""
        members = self.members[self.row]
        return values.sum() + (self.sums(values)[self.row] - members * values) / (members - 1)

    def jackknife_stderr(self, left_out: np.ndarray) -> float:
        """sqrt(Σ_g (m_g−1)/m_g · Σ_{i∈g} (θ_i − θ̄_g)²)."""
        factor = ((self.members - 1) / self.members)[self.row]
        return float(np.sqrt(np.sum(factor * self.around_means(left_out) ** 2)))

    def unit(self, index: int) -> str:
        return f"one rollout of group {int(self.labels[self.row[index]])}"

    @property
    def count(self) -> str:
        return f"{self.row.size} rollouts in {self.labels.size} groups"

    def needed(self, factor: float) -> tuple[int, int]:
        """As many groups as now, with `factor` times the rollouts in each."""
        per_prompt = max(2, math.ceil(self.row.size / self.labels.size * factor))
        return per_prompt * self.labels.size, self.labels.size


_KINDS: dict[str, type[RandomPrompts] | type[FixedPrompts]] = {"random": RandomPrompts, "fixed": FixedPrompts}
