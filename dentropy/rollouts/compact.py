"""Rows of a file without a Python object for every token: lists of token ids and of log-probabilities as arrays.

Only lists that hold what they should become arrays: whatever is wrong with one is said where it is read.
"""

from __future__ import annotations

import math
import sys

import numpy as np

from dentropy.large import Tape

IDS = ("prompt_ids", "response_ids", "completion_ids", "token_ids")
NUMBERS = ("sampler_logp", "advantage")
LARGEST = 2**31 - 1


class Compact:
    """Makes the rows of one file compact."""

    def __init__(self):
        self._ids, self._numbers = Tape(np.int32), Tape(np.float64)

    def row(self, row: dict) -> dict:
        """The row, its lists of numbers as arrays."""
        return {sys.intern(name): self._value(name, value) for name, value in row.items()}

    def _value(self, name: str, value):
        if not isinstance(value, list) or not value:
            return value
        if name in IDS and set(map(type, value)) == {int} and 0 <= min(value) <= max(value) <= LARGEST:
            return self._ids.add(value)
        if name in NUMBERS and set(map(type, value)) == {float} and all(map(math.isfinite, value)):
            return self._numbers.add(value)
        return value
