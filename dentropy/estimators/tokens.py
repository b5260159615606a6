"""The kept tokens of a table: what each is worth, where it stands in its response, and what comes after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import column
from dentropy.estimators.parts import Part, parts, token_ends
from dentropy.estimators.reweighting import token_weights
from dentropy.stats.segments import PIECE, place_in_sequence

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from dentropy.stats.tables import SequenceSums


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Per-token values, [N] packed in row order, of S responses.

    n_tokens  int64 [S], T_i
    row       int64 [N], the row of the table
    position  int64 [N], the place k in its response, from 1
    entropy, dlogp, dentropy   float64 [N]: h_k, dlogp_k, dh_k; h and dh times the token's weight; None for the last two
              where they were not asked for
    weight    float64 [N], 1; of rollouts of another sampler w_{<k}, or W_i of its rollout, see `token_weights`
    """

    n_tokens: np.ndarray
    row: np.ndarray
    position: np.ndarray
    entropy: np.ndarray
    dlogp: np.ndarray | None
    dentropy: np.ndarray | None
    weight: np.ndarray

    @classmethod
    def pieces(cls, sums: SequenceSums, weights: str, tangents: bool = True) -> Iterator[tuple[slice, KeptTokens]]:
        """Those of a table, of some rows at a time and with which these are; `row` counts from the first of them.

        Args:
            sums: the table.
            weights: the form of its base weights, "prefix" or "sequence".
            tangents: whether dlogp and dentropy are needed.

        Raises:
            ValueError: where tokens are missing, too few, too many, or not finite.
        """
        _check(sums, tangents)
        for rows, part in parts(sums):
            yield rows, cls._of(part, weights, tangents)

    @classmethod
    def _of(cls, sums: SequenceSums | Part, weights: str, tangents: bool) -> KeptTokens:
        n_tokens = lengths(sums)
        names = ("entropy", "dlogp", "dentropy") if tangents else ("entropy",)
        found = [np.asarray(getattr(sums.tokens, name), dtype=np.float64) for name in names]
        position = 1 + place_in_sequence(token_ends(sums))
        weight, (entropy, dlogp, dentropy) = token_weights(sums, weights), [*found, None, None][:3]
        row = np.repeat(np.arange(n_tokens.size), n_tokens)
        dentropy = None if dentropy is None else weight * dentropy
        return cls(n_tokens, row, position, weight * entropy, dlogp, dentropy, weight)

    def per_rollout(self, values: np.ndarray) -> np.ndarray:
        """Sums of `values` [N] over each response, float64 [S]."""
        return np.bincount(self.row, weights=values, minlength=self.n_tokens.size)

    def beyond(self, lag: int) -> tuple[np.ndarray, np.ndarray]:
        """(Σ_{j>k+lag} h_j in nats, Σ_{j>k+lag} 1) for every token k, its response from `lag` tokens after it on; with
        the weight of token j."""
        near = np.minimum(lag, self._behind)
        last, count = np.arange(self.row.size) + near, self._behind - near
        later, many = (after[last] + means * count for after, means in self._after)
        return later, many

    @cached_property
    def _behind(self) -> np.ndarray:
        """How many tokens stand behind each in its response, int64 [N]."""
        return self.n_tokens[self.row] - self.position

    @cached_property
    def _after(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of entropy and weight, per token: the sum of what comes after it, less the mean of its response; that mean.

        The running sum of deviations from a response's mean returns to 0 at its end, so that one sum over the whole
        batch does not lose digits as it goes on."""
        found, ends = [], np.arange(self.row.size) + self._behind
        for values in (self.entropy, self.weight):
            means = (self.per_rollout(values) / np.maximum(self.n_tokens, 1))[self.row]
            running = np.cumsum(values - means)
            found.append((running[ends] - running, means))
        return found

    def count_beyond(self, lag: int) -> np.ndarray:
        """How many tokens stand more than `lag` behind each in its response, int64 [N]."""
        return np.maximum(self._behind - lag, 0)

    def between(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """`beyond` for first ≤ j − k ≤ last."""
        (near, many), (far, few) = self.beyond(first - 1), self.beyond(last)
        return near - far, many - few


def _check(sums: SequenceSums, tangents: bool) -> None:
    if sums.tokens is None:
        raise ValueError("sums.tokens: None, expected those of a table measured with keep_tokens=True")
    for name in ("entropy", "dlogp", "dentropy") if tangents else ("entropy",):
        values = getattr(sums.tokens, name)
        if values is None:
            raise ValueError(f"sums.tokens.{name}: None, expected those of a pass with a direction")
        check_length(f"sums.tokens.{name}", values, int(lengths(sums).sum()), "token")
        check_finite(f"sums.tokens.{name}", values)


def check_finite(argument: str, values: ArrayLike) -> None:
    """ValueError naming the first token whose value, of [N], is not finite."""
    values = np.asarray(values)
    for start in range(0, len(values), PIECE):
        finite = np.isfinite(values[start : start + PIECE])
        if not finite.all():
            token = start + int(np.argmin(finite))
            raise ValueError(f"{argument}: {values[token]} at token {token}, expected finite values")


def lengths(sums: SequenceSums) -> np.ndarray:
    """T_i, int64 [S]."""
    return column(sums, "n_tokens").astype(np.int64)


def check_length(argument: str, values: np.ndarray, expected: int, unit: str) -> None:
    shape = tuple(np.shape(values))
    if shape != (expected,):
        raise ValueError(f"{argument}: shape {shape}, expected ({expected},): one value per {unit}")
