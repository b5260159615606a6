"""Checked access to the columns of a table of per-rollout sums, shared by the estimators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

PER = ("token", "sequence")
PROMPTS = ("random", "fixed")

_SECOND_ORDER = ("d2logp", "d2entropy")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def column(sums: SequenceSums, name: str, argument: str = "sums") -> np.ndarray:
    """The column `name` as float64 [S]; ValueError where it is missing or a value is not finite."""
    values = getattr(sums, name)
    if values is None:
        fix = (
            "order=2 (or give token_stats the d2logits)"
            if name in _SECOND_ORDER
            else ("a direction (or give token_stats the dlogits)")
        )
        raise ValueError(f"{argument}.{name} is None: the table has no such derivative; measure with {fix}")
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(
            f"{argument}.{name} is {values[row]} for rollout {int(sums.rollout[row])} "
            f"({np.sum(~finite)} of {values.size} rollouts are not finite), expected finite values"
        )
    return values


def sizes(sums: SequenceSums, per: str, argument: str = "sums") -> np.ndarray:
    """What a rollout counts for in the denominator, float64 [S]: its tokens, or 1 with per="sequence"."""
    n_tokens = column(sums, "n_tokens", argument)
    if n_tokens.size == 0:
        raise ValueError(f"{argument} has no rows, expected at least one rollout")
    if n_tokens.sum() == 0:
        raise ValueError(f"{argument}.n_tokens is 0 for all {n_tokens.size} rollouts, expected tokens in one")
    return n_tokens if per == "token" else np.ones_like(n_tokens)
