"""The leave-one-out jackknife: a statistic recomputed without each prompt group, from sums alone.

It expands nothing, so where the delta method's linear expansion of a ratio no longer holds the two part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dentropy.estimators.groups import Groups

# A denominator that keeps less of itself than this is a difference of nearly equal numbers, and the little
# that is left says nothing about the statistic.
SMALLEST_REST = 1e-6

# (the statistic with each unit of the groups left out, None), or (None, why not, in words)
LeftOut = tuple[np.ndarray | None, str | None]


def leave_one_out(
    formula: Callable[..., np.ndarray], terms: Sequence[np.ndarray], denominators: int, groups: Groups
) -> LeftOut:
    """The statistic formula(Σ_i terms[0]_i, Σ_i terms[1]_i, ...) with one unit of `groups` left out, each in turn.

    Args:
        formula: maps the totals, arrays of one shape, to the statistic, of that shape.
        terms: arrays [S], what each rollout adds to each total. The first `denominators` of them are nonnegative and
            what the formula divides by.
        groups: the prompt groups.

    Returns:
        (float64 [G] in the order of the group labels, or [S] on fixed prompts, None), or (None, the reason).
    """
    reason = groups.refusal()
    if reason is not None:
        return None, reason
    rest = [groups.rest(term) for term in terms]
    for left, term in zip(rest[:denominators], terms, strict=False):
        if left.min() < SMALLEST_REST * term.sum():
            unit = groups.unit(int(np.argmin(left)))
            return None, f"{unit} holds all but a millionth of the weight, so it cannot be left out"
    return formula(*rest), None
