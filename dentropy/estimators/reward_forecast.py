"""The change of the mean of a number that each rollout has: a reward, or any other."""

from __future__ import annotations

import numpy as np

from dentropy.estimators.mean_change import MeanChange, Rollouts, Scores, ratio_of_sums
from dentropy.estimators.tokens import check_length


def value_forecast(values: np.ndarray, rollouts: Rollouts) -> MeanChange:
    """Slope and change of the mean over rollouts of `values` [S], numbers that the weights do not enter.

    With b_i the mean of the other rollouts of the prompt, both are means of x_i = (r_i − b_i) s_i, s_i being ℓ'_i for
    the slope and w_i − 1 at η. In words: the mean over prompts of the sample covariance of reward and weight, which is
    unbiased, and whose derivative is the slope.
    """

    def of(scores: Scores):
        return ratio_of_sums(advantages(values, rollouts) * scores.rollout, np.ones_like(values), rollouts)

    changes = {eta: of(scores) for eta, scores in rollouts.at.items()}
    return MeanChange(base=rollouts.weighted_mean(values), slope=of(rollouts.first), changes=changes)


def advantages(values: np.ndarray, rollouts: Rollouts) -> np.ndarray:
    """r_i − b_i, float64 [S]."""
    return values - rollouts.others().mean(values)


def checked_values(argument: str, values, expected: int) -> np.ndarray:
    """`values` as float64 [S]; ValueError where they are not one finite number per rollout."""
    found = np.asarray(values)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{argument}: dtype {found.dtype}, expected numbers")
    check_length(argument, found, expected, "rollout")
    found = found.astype(np.float64)
    finite = np.isfinite(found)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"{argument}: {found[row]} at row {row}, expected finite numbers")
    return found
