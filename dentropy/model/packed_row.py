"""One row of sequences end to end: what a policy runs at a time, and which of its positions are scored."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dentropy.stats.segments import place_in_sequence


@dataclass(frozen=True, eq=False)
class PackedRow:
    """S sequences without padding, on a device, and all that a pass asks of the host: nothing is read back.

    tokens, positions: int64 [total], every sequence counted from 0. cu_seqlens: int32 [S + 1], where each begins.
    rows, targets: int64 [N]: the logits at `rows` of the row predict `targets`. bounds: `cu_seqlens` on the host.
    longest: the number of tokens of the longest sequence.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    targets: Tensor
    bounds: list[int]
    longest: int

    @classmethod
    def of(cls, tokens: np.ndarray, lengths: np.ndarray, rows: np.ndarray, targets: np.ndarray, device) -> "PackedRow":
        """tokens [total], in sequences of `lengths` [S]; rows and targets as above."""
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        positions = place_in_sequence(bounds)
        arrays = (tokens, positions, bounds.astype(np.int32), rows, targets)
        return cls(*(to_device(x, device) for x in arrays), bounds.tolist(), int(lengths.max()))


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """A copy of `x`, or on the CPU `x` itself. Nothing waits for it on the way to CUDA: it comes from pinned memory,
    which PyTorch keeps until the copy is done."""
    host = torch.from_numpy(x)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
