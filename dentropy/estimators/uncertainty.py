"""Standard errors clustered by prompt, from influence values (the delta method)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dentropy.estimators.columns import PROMPTS, check_choice


def clustered_stderr(
    influence: np.ndarray, group: np.ndarray, prompts: str = "random"
) -> tuple[float | None, str | None]:
    """Standard error of an estimate from its influence values, clustered by prompt group.

    With G groups g of m_g rollouts and influence values ψ_i [S]:

        "random"   sqrt( G/(G−1) · Σ_g (Σ_{i∈g} ψ_i)² )                  prompts drawn at random
        "fixed"    sqrt( Σ_g m_g/(m_g−1) · Σ_{i∈g} (ψ_i − mean_g ψ)² )   these very prompts, answers redrawn

    On a fixed set of prompts the first form is conservative. Intervals are value ± t·stderr, t with G − 1
    degrees of freedom ("random") or S − G ("fixed").

    Args:
        influence: [S] float, in the estimate's units.
        group: [S] int, the prompt group of each rollout.
        prompts: "random" or "fixed".

    Returns:
        (stderr, None), or (None, reason) where the groups do not allow a standard error: one group only
        ("random"), a group of one rollout ("fixed").

    Raises:
        ValueError: an unknown `prompts`, an `influence` that is empty or not one-dimensional, a `group` of
            another shape.

    Example:
        >>> import numpy as np
        >>> from dentropy.estimators import clustered_stderr
        >>> clustered_stderr(np.array([1.0, 1.0, -1.0, -1.0]), np.array([0, 0, 1, 1]))
        (4.0, None)
        >>> clustered_stderr(np.array([0.5, -0.5]), np.array([7, 7]))
        (None, "all 2 rollouts are in one group; prompts='random' needs two groups or more")
    """
    check_choice("prompts", prompts, PROMPTS)
    influence = np.asarray(influence, dtype=np.float64)
    if influence.ndim != 1 or influence.size == 0:
        raise ValueError(f"influence has shape {influence.shape}, expected [S] with S of at least 1")
    if np.shape(group) != influence.shape:
        raise ValueError(f"group has shape {np.shape(group)}, expected {influence.shape} as influence has")
    groups = Groups.of(group)
    reason = groups.refusal(prompts)
    if reason is not None:
        return None, reason
    return float(np.sqrt(variance_terms(influence, groups, prompts).sum())), None


class Groups(NamedTuple):
    """The prompt groups of a table: labels [G], the group's index of each row [S], and its size [G]."""

    labels: np.ndarray
    row: np.ndarray
    members: np.ndarray

    @classmethod
    def of(cls, group: np.ndarray) -> Groups:
        return cls(*np.unique(group, return_inverse=True, return_counts=True))

    def refusal(self, prompts: str) -> str | None:
        """Why these groups allow no standard error, in words; None where they do."""
        if prompts == "random":
            if self.labels.size > 1:
                return None
            count = f"all {self.row.size} rollouts are" if self.row.size > 1 else "the only rollout is"
            return f"{count} in one group; prompts='random' needs two groups or more"
        if self.members.min() > 1:
            return None
        alone = self.labels[self.members == 1]
        return (
            f"group {int(alone[0])} has one rollout ({alone.size} of {self.labels.size} groups do); "
            "prompts='fixed' needs two or more in every group"
        )

    def dof(self, prompts: str) -> int:
        """Degrees of freedom of the standard error: G − 1, or S − G (each prompt's mean is estimated)."""
        count = self.labels.size
        return count - 1 if prompts == "random" else self.row.size - count

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums of `values` [S] over each group, [G]."""
        return np.bincount(self.row, weights=values, minlength=self.labels.size)


def variance_terms(influence: np.ndarray, groups: Groups, prompts: str) -> np.ndarray:
    """The terms whose sum is the squared standard error: one per group [G], or per rollout [S] ("fixed")."""
    sums, count = groups.sums(influence), groups.labels.size
    if prompts == "random":
        return count / (count - 1) * sums**2
    within = influence - (sums / groups.members)[groups.row]
    return (groups.members / (groups.members - 1))[groups.row] * within**2
