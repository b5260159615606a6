"""A table a part at a time: what is computed from tokens on the way then stays small, however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from dentropy.stats.segments import pieces

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums


class Part:
    """Some rows of a table as a table, with their tokens: each column is taken when it is asked for."""

    def __init__(self, table, rows: slice | np.ndarray, tokens: slice | np.ndarray):
        self._table, self._rows, self._tokens = table, rows, tokens

    def __getattr__(self, name: str):
        value = getattr(self._table, name)
        if value is None:
            return None
        if name == "tokens":
            return Part(value, self._tokens, self._tokens)
        return value[self._tokens if name == "sampler_tokens" else self._rows]


def token_ends(table: SequenceSums | Part) -> np.ndarray:
    """int64 [S + 1]: where the tokens of each row start, and N at the end."""
    return np.concatenate([[0], np.cumsum(np.asarray(table.n_tokens).astype(np.int64))])


def parts(table: SequenceSums) -> Iterator[tuple[slice, Part]]:
    """All rows in turn, some at a time, and which they are."""
    ends = token_ends(table)
    for rows in pieces(ends):
        yield rows, Part(table, rows, slice(ends[rows.start], ends[rows.stop]))


def taken(table: SequenceSums, rows: np.ndarray, ends: np.ndarray) -> Part:
    """The rows `rows`, int64, in that order; `ends` are the table's `token_ends`."""
    starts, lengths = ends[rows], np.diff(ends)[rows]
    return Part(table, rows, np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum()))
