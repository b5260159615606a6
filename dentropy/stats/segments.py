"""Sums over the sequences of packed per-token values, in NumPy: sequence i has the elements ends[i]:ends[i + 1]."""

import numpy as np


def segment_sum(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[S] sums of `values` [N] over the sequences; those without elements give 0."""
    out = np.zeros(len(ends) - 1)
    filled = ends[1:] > ends[:-1]
    if filled.any():
        out[filled] = np.add.reduceat(values, ends[:-1][filled])
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
