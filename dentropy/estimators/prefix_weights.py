"""Prefix weights: in the moved policy's entropy, a token is weighed by what came before it alone.

The numerator and the denominator of R(η) = Σ_i H^w_i / Σ_i T^w_i are sums over the tokens j of a rollout,

    H^w_i = Σ_j w_{<j} h_j(η) ,     T^w_i = Σ_j w_{<j} ,     w_{<j} = exp Σ_{k<j} (logp_k(η) − logp_k(0)) ,

which need the values of every token at both weight settings. Given those, the weight of any position is there too, and
no column of a table could stand for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dentropy.estimators.columns import column
from dentropy.estimators.reweighting import LARGEST_LOG_WEIGHT, as_drawn
from dentropy.stats.segments import place_in_sequence, segment_sum, sum_before

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
    moved_entropy = _kept(moved, "moved", "entropy", int(column(base, "n_tokens", "base").sum()))
    ratios = token_ratios(as_drawn(base), moved, rows)
    ends, log_weight, log_ratio = ratios.ends, ratios.before, ratios.log_ratio
    lengths, place, at_end = np.diff(ends), place_in_sequence(ends), segment_sum(log_ratio, ends)
    entropy = moved_entropy[ratios.in_moved]
    have = np.bincount(place)
    from_here = 1.0 - np.concatenate([[0], np.cumsum(have)]) / ends[-1]  # share of the tokens at or behind a position
    behind = from_here[lengths]  # 0 for the longest rollouts, whose last weight counts nowhere
    largest = np.where(behind > 0, at_end, 0.0)
    np.maximum.at(largest, np.repeat(np.arange(lengths.size), lengths), log_weight)
    weight = np.exp(log_weight - np.repeat(largest, lengths))
    mean = segment_sum((have / ends[-1])[place] * weight, ends) + behind * np.exp(np.minimum(at_end - largest, 0.0))
    fractions = _ess_fractions(log_weight, place, have)[from_here[:-1] > 1 - CARRIED]
    worst = int(np.argmin(fractions))
    return PrefixWeights(
        log_weights=np.log(mean) + largest,
        entropy=segment_sum(weight * entropy, ends) / mean,
        size=segment_sum(weight, ends) / mean,
        worst_position=worst + 1,
        worst_ess_fraction=float(fractions[worst]),
    )


class TokenRatios(NamedTuple):
    """How much likelier the moved policy makes each token, packed in the row order of the base table.

    ends       int64 [S + 1], where each rollout's tokens start, and N at the end
    in_moved   int64 [N], the place of each token among those of the moved table
    log_ratio  float64 [N], log ρ_k = logp_k(η) − logp_k(0)
    before     float64 [N], log w_{<k}: the sum of those before it in its rollout
    """

    ends: np.ndarray
    in_moved: np.ndarray
    log_ratio: np.ndarray
    before: np.ndarray

    @property
    def reach(self) -> np.ndarray:
        """float64 [S], the largest log-weight of each rollout's first tokens, in nats; 0 where it has none."""
        largest = np.zeros(len(self.ends) - 1)
        np.maximum.at(largest, np.repeat(np.arange(largest.size), np.diff(self.ends)), self.before + self.log_ratio)
        return largest


def token_ratios(base: SequenceSums, moved: SequenceSums, rows: np.ndarray) -> TokenRatios:
    """Those of two tables that kept their tokens; see `prefix_weights` for `rows` and for what is refused."""
    lengths = column(base, "n_tokens", "base").astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    moved_lengths = column(moved, "n_tokens", "moved").astype(np.int64)
    in_moved = np.repeat((np.cumsum(moved_lengths) - moved_lengths)[rows], lengths) + place_in_sequence(ends)
    log_ratio = _kept(moved, "moved", "logp", ends[-1])[in_moved] - _kept(base, "base", "logp", ends[-1])
    return TokenRatios(ends, in_moved, log_ratio, sum_before(log_ratio, ends))


def check_reach(log_weights: np.ndarray, rollout: np.ndarray) -> None:
    """ValueError for a weight [S] beyond what a measurement can stand; the rollout is named."""
    far = int(np.argmax(log_weights))
    if log_weights[far] > LARGEST_LOG_WEIGHT:
        raise ValueError(
            f"moved.tokens.logp: log-weights of rollout {rollout[far]} reach {log_weights[far]:.0f} nats, "
            f"expected at most {LARGEST_LOG_WEIGHT:g}, a move small enough to measure by importance sampling"
        )


def _ess_fractions(log_weight: np.ndarray, place: np.ndarray, have: np.ndarray) -> np.ndarray:
    """(Σ w)² / Σ w² at each position over the number of rollouts that have it."""
    largest = np.full(have.size, -np.inf)
    np.maximum.at(largest, place, log_weight)
    weight = np.exp(log_weight - largest[place])
    return np.bincount(place, weight) ** 2 / (np.bincount(place, weight**2) * have)


def _kept(sums: SequenceSums, argument: str, name: str, expected: int) -> np.ndarray:
    """A value of every token, float64 [tokens]."""
    if sums.tokens is None:
        raise ValueError(f"{argument}.tokens: None, expected those of a table measured with keep_tokens=True")
    values = np.asarray(getattr(sums.tokens, name), dtype=np.float64)
    if values.shape != (expected,):
        raise ValueError(f"{argument}.tokens.{name}: shape {values.shape}, expected ({expected},) by n_tokens")
    finite = np.isfinite(values)
    if not finite.all():
        token = int(np.argmin(finite))
        raise ValueError(f"{argument}.tokens.{name}: {values[token]} at token {token}, expected finite values")
    return values
