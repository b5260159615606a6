"""Baselines: what the other rollouts of a prompt have on average, of a number or of tokens left at a place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dentropy.estimators.groups import Groups


@dataclass(frozen=True, eq=False)
class Others:
    """The rollouts of these groups, each with a weight W_j, float64 [S].

    A baseline of one rollout is the mean over the others of its prompt; a rollout that is its prompt's only one takes
    the mean of all others. It leaves every expectation as it is, for a baseline may depend on anything but the
    rollout's own tokens from there on.
    """

    groups: Groups
    weight: np.ndarray

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Of `values` [S], float64 [S]."""
        weighted = self.weight * values
        return self._mean(weighted, self.groups.sums(weighted)[self.groups.row], weighted.sum(), slice(None))

    def tokens_left(self, n_tokens: np.ndarray) -> TokensLeft:
        """Of the tokens behind a place in rollouts of lengths `n_tokens`, int64 [S]."""
        of_group = _Behind.of(self.groups.row, n_tokens, self.weight)
        of_all = _Behind.of(np.zeros_like(n_tokens), n_tokens, self.weight)
        return TokensLeft(self, n_tokens, of_group, of_all)

    def _mean(self, own: np.ndarray, of_group: np.ndarray, of_all: np.ndarray, row: np.ndarray | slice) -> np.ndarray:
        """From what is averaged, W times: of the rollout `row` itself, summed over its prompt, and over all."""
        groups = self.groups
        alone = (groups.members == 1)[groups.row][row]
        others = np.where(alone, of_all, of_group) - own
        rest = np.where(alone, self.weight.sum(), groups.sums(self.weight)[groups.row][row]) - self.weight[row]
        return others / np.where(rest > 0, rest, 1.0)


@dataclass(frozen=True, eq=False)
class TokensLeft:
    """T_i − k − b_k of any token, b_k what the other rollouts of its prompt have left at k on average, 0 for those that
    have ended."""

    others: Others
    n_tokens: np.ndarray
    of_group: _Behind
    of_all: _Behind

    def at(self, row: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Of the tokens at `place` [n], from 1, in rollouts `row` [n]: float64 [n]."""
        own, weight = self.n_tokens[row] - place, self.others.weight[row]
        of_group = self.of_group.at(self.others.groups.row[row], place)
        of_all = self.of_all.at(np.zeros_like(row), place)
        return own - self.others._mean(weight * own, of_group, of_all, row)


@dataclass(frozen=True, eq=False)
class _Behind:
    """Σ_j W_j (T_j − k)₊ over the rollouts of a label: rollouts in the order of label and length, and running sums of W
    and W T, so that it takes one look-up and not a pass over tokens."""

    width: int
    ordered: np.ndarray
    ends: np.ndarray
    weight: np.ndarray
    weighted: np.ndarray

    @classmethod
    def of(cls, label: np.ndarray, n_tokens: np.ndarray, weight: np.ndarray) -> _Behind:
        width = int(n_tokens.max()) + 1
        key = label * width + n_tokens
        order = np.argsort(key, kind="stable")
        ends = np.cumsum(np.bincount(label))
        running = (np.concatenate([[0.0], np.cumsum(x[order])]) for x in (weight, weight * n_tokens))
        return cls(width, key[order], ends, *running)

    def at(self, label: np.ndarray, place: np.ndarray) -> np.ndarray:
        first, end = np.searchsorted(self.ordered, label * self.width + place, side="right"), self.ends[label]
        return self.weighted[end] - self.weighted[first] - place * (self.weight[end] - self.weight[first])
