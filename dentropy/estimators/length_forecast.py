"""The change of the mean length: a token cannot change how many came before it, only how many follow."""

from __future__ import annotations

import numpy as np

from dentropy.estimators.mean_change import MeanChange, Rollouts, Scores, ratio_of_sums


def length_forecast(rollouts: Rollouts) -> MeanChange:
    """Slope and change of the mean number of generated tokens, in tokens per rollout.

    Both are means of x_i = Σ_k s_k (T_i − k − b_k), with the score s_k = dlogp_k, or w_{<k}(ρ_k − 1) at η. The baseline
    b_k is what the other rollouts of the prompt have left at k on average, 0 for those that have ended.
    """
    tokens = rollouts.tokens
    left = _tokens_left(rollouts)
    lengths = tokens.n_tokens.astype(np.float64)

    def of(scores: Scores):
        return ratio_of_sums(tokens.per_rollout(scores.token * left), np.ones_like(lengths), rollouts)

    changes = {eta: of(scores) for eta, scores in rollouts.at.items()}
    return MeanChange(base=rollouts.weighted_mean(lengths), slope=of(rollouts.first), changes=changes)


def _tokens_left(rollouts: Rollouts) -> np.ndarray:
    """T_i − k − b_k of every token, float64 [N]."""
    tokens, groups = rollouts.tokens, rollouts.groups()
    own = tokens.n_tokens[tokens.row] - tokens.position
    weight = rollouts.weight[tokens.row]
    of_group = _beyond(groups.row[tokens.row], tokens.position, weight)
    of_all = _beyond(np.zeros_like(tokens.row), tokens.position, weight)
    return own - rollouts.mean_of_others(weight * own, of_group, of_all, tokens.row)


def _beyond(label: np.ndarray, position: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """For each token, Σ_j W_j (T_j − k)₊ over the rollouts of its label: the weight of their tokens behind it."""
    width = position.max() + 1
    place = label * width + position
    order = np.argsort(place, kind="stable")
    ordered, running = place[order], np.concatenate([[0.0], np.cumsum(weight[order])])
    return running[np.searchsorted(ordered, (label + 1) * width)] - running[np.searchsorted(ordered, place, "right")]
