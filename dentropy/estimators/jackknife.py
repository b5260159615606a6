"""The leave-one-out jackknife: a statistic recomputed without each prompt group, from sums alone.

It expands nothing, so where the delta method's linear expansion of a ratio no longer holds the two part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dentropy.estimators.uncertainty import Groups

# A denominator that keeps less of itself than this is a difference of nearly equal numbers, and the little
# that is left says nothing about the statistic.
SMALLEST_REST = 1e-6


def leave_one_out(
    formula: Callable[..., np.ndarray], terms: Sequence[np.ndarray], denominators: int, groups: Groups, prompts: str
) -> tuple[np.ndarray | None, str | None]:
    """The statistic formula(Σ_i terms[0]_i, Σ_i terms[1]_i, ...) with one group, or one rollout, left out.

    "random" leaves out one group at a time: A − A_g for each total A. "fixed" leaves out one rollout and
    lets the other m_g − 1 of its prompt stand for it, so that every prompt keeps its weight:
    A + (A_g − m_g a_i) / (m_g − 1).

    Args:
        formula: maps the totals, arrays of one shape, to the statistic, of that shape.
        terms: arrays [S], what each rollout adds to each total. The first `denominators` of them are
            nonnegative and what the formula divides by.
        groups: the prompt groups.
        prompts: "random" or "fixed".

    Returns:
        (float64 [G] in the order of the group labels, or [S] for "fixed", None), or (None, the reason).
    """
    reason = groups.refusal(prompts)
    if reason is not None:
        return None, reason
    if prompts == "random":
        rest = [term.sum() - groups.sums(term) for term in terms]
    else:
        members = groups.members[groups.row]
        rest = [term.sum() + (groups.sums(term)[groups.row] - members * term) / (members - 1) for term in terms]
    for left, term in zip(rest[:denominators], terms, strict=False):
        if left.min() < SMALLEST_REST * term.sum():
            out = int(np.argmin(left))
            name = (
                f"group {int(groups.labels[out])}"
                if prompts == "random"
                else (f"one rollout of group {int(groups.labels[groups.row[out]])}")
            )
            return None, f"{name} holds all but a millionth of the weight, so it cannot be left out"
    return formula(*rest), None


def jackknife_stderr(values: np.ndarray, groups: Groups, prompts: str) -> float:
    """Standard error from leave-one-out values θ.

    "random": sqrt((G−1)/G · Σ_g (θ_g − θ̄)²). "fixed": sqrt(Σ_g (m_g−1)/m_g · Σ_{i∈g} (θ_i − θ̄_g)²).
    """
    if prompts == "random":
        count = groups.labels.size
        return float(np.sqrt((count - 1) / count * np.sum((values - values.mean()) ** 2)))
    within = values - (groups.sums(values) / groups.members)[groups.row]
    return float(np.sqrt(np.sum(((groups.members - 1) / groups.members)[groups.row] * within**2)))
