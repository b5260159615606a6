"""Arrays that may be larger than memory: from some size on they lie in a file without a name, which goes with them."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

IN_MEMORY = 2**26  # bytes; what is larger is mapped


def empty(n: int, dtype) -> np.ndarray:
    """[n], not initialized, in memory up to 64 MiB and beyond in a file in the folder for temporary ones (TMPDIR).

    Pages of a file are memory only while there is some to spare.

    Raises:
        OSError: where that folder has no room.

    Example:
        >>> empty(3, np.float32).shape
        (3,)
    """
    dtype = np.dtype(dtype)
    size = n * dtype.itemsize
    if size <= IN_MEMORY:
        return np.empty(n, dtype)
    with tempfile.TemporaryFile(prefix="dentropy-") as file:
        _reserve(file.fileno(), size)
        return np.asarray(np.memmap(file, dtype, "r+", shape=(n,)))


def column(n: int, like: Tensor) -> Tensor:
    """[n], not initialized, of the dtype and on the device of `like`; on the CPU as `empty`."""
    if like.device.type != "cpu":
        return like.new_empty(n)
    import torch

    return torch.from_numpy(empty(n, like.numpy().dtype))


def _reserve(file: int, size: int) -> None:
    """All of it at once: where a disk fills up under a mapped file, the process ends without a word."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{tempfile.gettempdir()}: {error.strerror}, expected {size / 2**30:.1f} GiB for values of single tokens "
            "(TMPDIR names another folder)",
        ) from error


class Tape:
    """Arrays of one dtype, one behind the other in blocks of `empty`: many small ones cost no memory of their own.

    Example:
        >>> tape = Tape(np.int32)
        >>> tape.add([1, 2]), tape.add([])
        (array([1, 2], dtype=int32), array([], dtype=int32))
    """

    SMALLEST, LARGEST = 2**16, 2**27  # elements of a block; each is twice the one before

    def __init__(self, dtype):
        self._block, self._used = np.empty(0, dtype), 0

    def add(self, values) -> np.ndarray:
        """`values` as they are kept."""
        if self._used + len(values) > len(self._block):
            size = min(max(2 * len(self._block), self.SMALLEST), self.LARGEST)
            self._block, self._used = empty(max(size, len(values)), self._block.dtype), 0
        kept = self._block[self._used : self._used + len(values)]
        kept[:] = values
        self._used += len(values)
        return kept
