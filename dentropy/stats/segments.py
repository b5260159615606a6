"""Sums over the sequences of packed per-token values, in NumPy: sequence i has the elements ends[i]:ends[i + 1]."""

from collections.abc import Iterator

import numpy as np

# Elements that are worked on at a time: what is computed from them on the way is several times as large.
PIECE = 2**20


def pieces(ends: np.ndarray) -> Iterator[slice]:
    """All sequences in turn, as many at a time as have PIECE elements together, or one that has more."""
    start, last = 0, len(ends) - 1
    while start < last:
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + PIECE, side="right")) - 1)
        yield slice(start, stop)
        start = stop
    if not last:
        yield slice(0, 0)


def segment_sum(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[S] sums of `values` [N] over the sequences; those without elements give 0."""
    out = np.zeros(len(ends) - 1)
    filled = ends[1:] > ends[:-1]
    if filled.any():
        out[filled] = np.add.reduceat(values, ends[:-1][filled])
    return out


def segment_max(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[S] the largest of `values` [N] of each sequence, or 0 where that is larger or there is none."""
    out = np.zeros(len(ends) - 1)
    filled = ends[1:] > ends[:-1]
    if filled.any():
        out[filled] = np.maximum(np.maximum.reduceat(values, ends[:-1][filled]), 0.0)
    return out


def sum_before(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[N] for each element the sum of those before it in its own sequence.

    It is their mean times their number and what they deviate from the mean. The running sum of the deviations returns
    to 0 at the end of every sequence, so one sum over all elements is exact to rounding within each.
    """
    lengths = np.diff(ends)
    means = np.repeat(segment_sum(values, ends) / np.maximum(lengths, 1), lengths)
    running = np.concatenate([[0.0], np.cumsum(values - means)])
    before = running[:-1] - np.repeat(running[ends[:-1]], lengths)
    return before + means * place_in_sequence(ends)


def place_in_sequence(ends: np.ndarray) -> np.ndarray:
    """[N] int64, the number of elements before each in its own sequence."""
    return np.arange(ends[-1]) - np.repeat(ends[:-1], np.diff(ends))
