"""Rollouts of another sampler, made to count as the policy's own: the one place where a sampler's probabilities enter.

With the sampler q, the policy π and ρ_k = π(y_k)/q(y_k), each given what came before, a mean over rollouts of π is one
over rollouts of q with base weights:

    "sequence"   W_i = Π_k ρ_k           for every sum over rollouts
    "prefix"     w_{<j} = Π_{k<j} ρ_k    for a sum over tokens j of what is settled before token j: it varies less

Estimators read tables whose columns hold the weights, and know of none. Without a sampler the table is the one it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.parts import Part, parts, token_ends
from dentropy.stats.segments import segment_sum, sum_before

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

# The weights that belong to a form of the slope and of the curvature.
FORM = {"causal": "prefix", "exact": "sequence", "mixed": "sequence"}
# In nats. Squares of such a weight are still far inside the range of float64, and no estimate survives it.
LARGEST_LOG_WEIGHT = 300.0
# Scores are factors of a rollout's weight; labels are no numbers. All other columns are what is averaged.
_AS_THEY_ARE = ("logp", "dlogp", "d2logp", "second_order_step", "sampler_logp", "group", "rollout")


def sequence_weights(sums: SequenceSums) -> np.ndarray:
    """W_i, float64 [S], 1 without a sampler; ValueError where one is beyond what an estimate can stand."""
    if sums.sampler_logp is None:
        return np.ones(np.shape(sums.n_tokens))
    return _exp(sums.logp - sums.sampler_logp, sums.rollout)


def token_weights(sums: SequenceSums, weights: str) -> np.ndarray:
    """w_{<j} or, with "sequence" weights, W_i of every kept token, float64 [N]; 1 without a sampler."""
    lengths = np.asarray(sums.n_tokens).astype(np.int64)
    row = np.repeat(np.arange(lengths.size), lengths)
    if sums.sampler_logp is None or weights == "sequence":
        return sequence_weights(sums)[row]
    return _exp(sum_before(token_log_ratios(sums), token_ends(sums)), sums.rollout[row])


def token_log_ratios(sums: SequenceSums) -> np.ndarray:
    """log ρ_k of every kept token of a table with a sampler, float64 [N]."""
    sampler = _sampler_tokens(sums)
    return np.asarray(sums.tokens.logp, dtype=np.float64) - sampler


def score_weights(sums: SequenceSums, weights: str) -> np.ndarray:
    """The weight of what is settled with a token, not before: w_{<k} ρ_k, or W_i. float64 [N]; 1 without a sampler."""
    if sums.sampler_logp is None or weights == "sequence":
        return token_weights(sums, weights)
    return token_weights(sums, weights) * np.exp(token_log_ratios(sums))


def weighted(sums: SequenceSums, weights: str) -> SequenceSums:
    """The table with its base weights in all columns that are averaged, from T_i on; the same one without a sampler.

    Raises:
        ValueError: log-weights beyond 300 nats (the rollout is named); with "prefix" weights a table without kept
            tokens, which they are made of.
    """
    if sums.sampler_logp is None:
        return sums
    if weights == "prefix":
        _sampler_tokens(sums)
        token_columns = [name for name, values in sums.tokens._asdict().items() if values is not None]
        found = [_prefix_columns(part, list(sums.columns()), token_columns) for _, part in parts(sums)]
        return replace(sums, **{name: np.concatenate([part[name] for part in found]) for name in found[0]})
    weight = sequence_weights(sums)
    averaged = {name: column * weight for name, column in sums.columns().items() if name not in _AS_THEY_ARE}
    return replace(sums, **averaged)


def as_drawn(sums: SequenceSums) -> SequenceSums:
    """The table with the log-probabilities that its rollouts were drawn with, by rollout and by kept token."""
    if sums.sampler_logp is None:
        return sums
    kept = {} if sums.tokens is None else {"tokens": sums.tokens._replace(logp=_sampler_tokens(sums))}
    return replace(sums, logp=sums.sampler_logp, **kept)


def _prefix_columns(sums: Part, present: Sequence[str], token_columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of `SequenceSums` that are `present`, terms of token j times w_{<j}; h_k dlogp_k, which y_k settles,
    times ρ_k too."""
    ends, weight, with_own = token_ends(sums), token_weights(sums, "prefix"), score_weights(sums, "prefix")
    tokens = {name: np.asarray(getattr(sums.tokens, name), dtype=np.float64) for name in token_columns}
    terms = {"n_tokens": np.ones_like(weight)}
    terms |= {name: values for name, values in tokens.items() if name not in _AS_THEY_ARE}
    if "dlogp" in tokens:
        first = sum_before(tokens["dlogp"], ends)
        terms |= {"entropy_to_go": tokens["entropy"] * first, "length_to_go": first}
    if "d2logp" in tokens:
        second = first**2 + sum_before(tokens["d2logp"], ends)
        terms["dentropy_to_go"] = tokens["dentropy"] * first
        terms |= {"entropy_to_go_2": tokens["entropy"] * second, "length_to_go_2": second}
    found = {name: segment_sum(weight * values, ends) for name, values in terms.items() if name in present}
    if "dlogp" in tokens:
        found["entropy_dlogp"] = segment_sum(with_own * tokens["entropy"] * tokens["dlogp"], ends)
    return found


def _sampler_tokens(sums: SequenceSums) -> np.ndarray:
    """The sampler's log-probability of every kept token; ValueError where the table has not kept them all."""
    expected = (int(np.sum(sums.n_tokens)),)
    if sums.tokens is None or sums.sampler_tokens is None:
        raise ValueError(
            "sums.sampler_tokens: None, expected those of a table measured with keep_tokens=True: rollouts of another "
            "sampler are weighed token by token in the causal and prefix forms"
        )
    for name, values in (("tokens.logp", sums.tokens.logp), ("sampler_tokens", sums.sampler_tokens)):
        if np.shape(values) != expected:
            raise ValueError(f"sums.{name}: shape {np.shape(values)}, expected {expected} by n_tokens")
    return np.asarray(sums.sampler_tokens, dtype=np.float64)


def _exp(log_weight: np.ndarray, rollout: np.ndarray) -> np.ndarray:
    far = int(np.argmax(log_weight)) if log_weight.size else 0
    if log_weight.size and not log_weight[far] <= LARGEST_LOG_WEIGHT:
        raise ValueError(
            f"sums.sampler_logp: base log-weights of rollout {int(rollout[far])} reach {log_weight[far]:.0f} nats, "
            f"expected at most {LARGEST_LOG_WEIGHT:g}, a sampler close enough to the policy to be reweighted"
        )
    return np.exp(log_weight)
