"""Prefix weights: in the moved policy's entropy, a token is weighed by what came before it alone.

The numerator and the denominator of R(η) = Σ_i H^w_i / Σ_i T^w_i are sums over the tokens j of a rollout,

    H^w_i = Σ_j w_{<j} h_j(η) ,     T^w_i = Σ_j w_{<j} ,     w_{<j} = exp Σ_{k<j} (logp_k(η) − logp_k(0)) ,

which need the values of every token at both weight settings. Given those, the weight of any position is there too, and
no column of a table could stand for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dentropy.estimators.columns import column
from dentropy.estimators.parts import Part, parts, taken, token_ends
from dentropy.estimators.reweighting import LARGEST_LOG_WEIGHT, as_drawn
from dentropy.estimators.tokens import check_finite
from dentropy.stats.segments import place_in_sequence, segment_max, segment_sum, sum_before

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

# The share of the tokens whose positions are looked at for the worst one: the longest rollouts may be few, and what
# is said of so small a part of the tokens does not decide.
CARRIED = 0.95


class PrefixWeights(NamedTuple):
    """What the sums over tokens of each rollout come to, float64 [S], and the position that is worst off.

    log_weights         log M_i: the weight of the rollout's first tokens, a mean over positions j as the batch's tokens
                        are spread over them; behind its end a rollout keeps the weight it ended with, so that the mean
                        of M is 1 in expectation
    entropy, size       H^w_i / M_i and T^w_i / M_i: with M_i for w_i the measurement is Σ w_i entropy_i / Σ w_i size_i
    worst_position      the position, from 1, whose weights w_{<j} have the smallest effective sample size for their
                        number, among those before which less than 95% of the tokens are
    worst_ess_fraction  that size (Σ w)² / Σ w² as a fraction of the rollouts that have the position
    """

    log_weights: np.ndarray
    entropy: np.ndarray
    size: np.ndarray
    worst_position: int
    worst_ess_fraction: float


def prefix_weights(base: SequenceSums, moved: SequenceSums, rows: np.ndarray) -> PrefixWeights:
    """The prefix weights of two tables that kept their tokens; `rows` [S] is the row of `moved` for each of `base`.

    Of rollouts of another sampler they are those from its probabilities to the moved policy's. Weights are relative to
    the rollout's largest, or the position's: none overflows.

    Raises:
        ValueError: no kept tokens, or another number of them than the rows have; a value that is not finite.
    """
    _check_kept(moved, "moved", "entropy", int(column(base, "n_tokens", "base").sum()))
    number = np.bincount(column(base, "n_tokens", "base").astype(np.int64))  # of rollouts of each length
    have = number[::-1].cumsum()[::-1][1:]  # of those that have a position
    n_tokens = have.sum()
    from_here = 1.0 - np.concatenate([[0], np.cumsum(have)]) / n_tokens  # share of the tokens at or behind a position
    at_positions, found = _Positions(have.size), []
    for _, of_moved, ratios in token_ratios(as_drawn(base), moved, rows):
        ends, log_weight = ratios.ends, ratios.before
        lengths, place, at_end = np.diff(ends), place_in_sequence(ends), segment_sum(ratios.log_ratio, ends)
        behind = from_here[lengths]  # 0 for the longest rollouts, whose last weight counts nowhere
        largest = np.maximum(segment_max(log_weight, ends), np.where(behind > 0, at_end, 0.0))
        weight = np.exp(log_weight - np.repeat(largest, lengths))
        mean = segment_sum((have / n_tokens)[place] * weight, ends)
        mean += behind * np.exp(np.minimum(at_end - largest, 0.0))
        entropy = segment_sum(weight * np.asarray(of_moved.tokens.entropy, dtype=np.float64), ends)
        found.append((np.log(mean) + largest, entropy / mean, segment_sum(weight, ends) / mean))
        at_positions.add(log_weight, place)
    fractions = at_positions.ess()[from_here[:-1] > 1 - CARRIED] / have[from_here[:-1] > 1 - CARRIED]
    worst = int(np.argmin(fractions))
    log_weights, entropy, size = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return PrefixWeights(log_weights, entropy, size, worst + 1, float(fractions[worst]))


class TokenRatios(NamedTuple):
    """How much likelier the moved policy makes each token of some rollouts, packed.

    ends       int64 [S + 1], where each rollout's tokens start, and N at the end
    log_ratio  float64 [N], log ρ_k = logp_k(η) − logp_k(0)
    before     float64 [N], log w_{<k}: the sum of those before it in its rollout
    """

    ends: np.ndarray
    log_ratio: np.ndarray
    before: np.ndarray

    @property
    def reach(self) -> np.ndarray:
        """float64 [S], the largest log-weight of each rollout's first tokens, in nats; 0 where it has none."""
        return segment_max(self.before + self.log_ratio, self.ends)


def token_ratios(
    base: SequenceSums, moved: SequenceSums, rows: np.ndarray
) -> Iterator[tuple[slice, Part, TokenRatios]]:
    """Those of two tables that kept their tokens, for some rows of `base` at a time: which these are, the rows of
    `moved` that belong to them, and the ratios. See `prefix_weights` for `rows` and for what is refused."""
    n_tokens = int(column(base, "n_tokens", "base").sum())
    column(moved, "n_tokens", "moved")
    _check_kept(moved, "moved", "logp", n_tokens)
    _check_kept(base, "base", "logp", n_tokens)
    moved_ends = token_ends(moved)
    for part, of_base in parts(base):
        of_moved, ends = taken(moved, rows[part], moved_ends), token_ends(of_base)
        logp = (np.asarray(table.tokens.logp, dtype=np.float64) for table in (of_moved, of_base))
        log_ratio = np.subtract(*logp)
        yield part, of_moved, TokenRatios(ends, log_ratio, sum_before(log_ratio, ends))


def reach(base: SequenceSums, moved: SequenceSums, rows: np.ndarray) -> float:
    """The largest log-weight, in nats, of the first tokens of any rollout; as `token_ratios`."""
    return max(float(ratios.reach.max()) for _, _, ratios in token_ratios(base, moved, rows))


def check_reach(log_weights: np.ndarray, rollout: np.ndarray) -> None:
    """ValueError for a weight [S] beyond what a measurement can stand; the rollout is named."""
    far = int(np.argmax(log_weights))
    if log_weights[far] > LARGEST_LOG_WEIGHT:
        raise ValueError(
            f"moved.tokens.logp: log-weights of rollout {rollout[far]} reach {log_weights[far]:.0f} nats, "
            f"expected at most {LARGEST_LOG_WEIGHT:g}, a move small enough to measure by importance sampling"
        )


class _Positions:
    """Σ w and Σ w² at each position, relative to the largest w there has been."""

    def __init__(self, count: int):
        self._largest = np.full(count, np.finfo(np.float64).min)
        self._sums = np.zeros((2, count))

    def add(self, log_weight: np.ndarray, place: np.ndarray) -> None:
        largest = self._largest.copy()
        np.maximum.at(largest, place, log_weight)
        weight = np.exp(log_weight - largest[place])
        for power, total in enumerate(self._sums, 1):
            total *= np.exp(self._largest - largest) ** power
            total += np.bincount(place, weight**power, minlength=total.size)
        self._largest = largest

    def ess(self) -> np.ndarray:
        """(Σ w)² / Σ w²."""
        return self._sums[0] ** 2 / self._sums[1]


def _check_kept(sums: SequenceSums, argument: str, name: str, expected: int) -> None:
    """There is a finite value for every token."""
    if sums.tokens is None:
        raise ValueError(f"{argument}.tokens: None, expected those of a table measured with keep_tokens=True")
    values = getattr(sums.tokens, name)
    shape = tuple(np.shape(values))
    if shape != (expected,):
        raise ValueError(f"{argument}.tokens.{name}: shape {shape}, expected ({expected},) by n_tokens")
    check_finite(f"{argument}.tokens.{name}", values)
