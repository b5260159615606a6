"""The change of the mean length: a token cannot change how many came before it, only how many follow."""

from __future__ import annotations

import numpy as np

from dentropy.estimators.mean_change import MeanChange, Rollouts, Scores, ratio_of_sums


def length_forecast(rollouts: Rollouts) -> MeanChange:
    """Slope and change of the mean number of generated tokens, in tokens per rollout.

    Both are means of x_i = Σ_k s_k (T_i − k − b_k), with the score s_k = dlogp_k, or w_{<k}(ρ_k − 1) at η. The baseline
    b_k is what the other rollouts of the prompt have left at k on average, 0 for those that have ended.
    """

    def of(scores: Scores):
        return ratio_of_sums(scores.length, np.ones_like(rollouts.n_tokens), rollouts)

    changes = {eta: of(scores) for eta, scores in rollouts.at.items()}
    return MeanChange(base=rollouts.weighted_mean(rollouts.n_tokens), slope=of(rollouts.first), changes=changes)
