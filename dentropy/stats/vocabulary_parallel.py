"""Heads whose rows, the vocabulary, are sharded over the ranks of a process group, in the order of the ranks.

Each rank takes its own rows through the online softmax; of the result, a dozen numbers per token, every rank gets
those of all others and merges them. Logits never travel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dentropy.stats.checks import check_linear, check_targets


def gather(tensor: Tensor, process_group) -> Tensor:
    """[ranks, *shape]: what every rank handed in, of one shape and dtype, in the order of the ranks."""
    shards = [torch.empty_like(tensor) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(shards, tensor, group=process_group)
    return torch.stack(shards)


class HeadRows:
    """The rows of a head that this rank holds, `rows` of them, `most` on any rank, and what ranks do together where a
    process group shares them. Without a group the head is whole."""

    def __init__(self, rows: int, process_group, device: torch.device):
        self._rows, self._group, self._first, self.most = rows, process_group, 0, rows
        if process_group is not None:
            sizes = gather(torch.full((1,), rows, dtype=torch.int64, device=device), process_group)[:, 0]
            self._first, self.most = int(sizes[: dist.get_rank(process_group)].sum()), int(sizes.max())

    def over_ranks(self, x: Tensor, op: str = "SUM") -> Tensor:
        """The sum, or the MAX, of the ranks' x, in place."""
        if self._group is not None:
            dist.all_reduce(x, getattr(dist.ReduceOp, op), self._group)
        return x

    def places(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens, their row here, and whether they have one; those of other ranks are given row 0."""
        if self._group is None:
            return targets, torch.ones_like(targets, dtype=torch.bool)
        here = (targets >= self._first) & (targets < self._first + self._rows)
        return (targets - self._first).masked_fill(~here, 0), here

    def log_softmax(self, z: Tensor) -> Tensor:
        """Of logits [N, rows], over the whole vocabulary."""
        if self._group is None:
            return torch.log_softmax(z, -1)
        top = self.over_ranks(z.amax(-1, keepdim=True), "MAX")
        return z - (top + self.over_ranks((z - top).exp().sum(-1, keepdim=True)).log())


def checked_linear(
    hidden, weight, targets, dhidden, dweight, bias, dbias, temperature, softcap, process_group, validate: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Checks the arguments of `linear_token_stats`; targets counted from the first row of `weight`, and how to gather
    what the shards have (None: the head is whole)."""
    check_linear(hidden, weight, dhidden, dweight, bias, dbias, temperature, softcap)
    rows, device = len(hidden), hidden.device
    if process_group is None:
        check_targets(targets, rows, len(weight), device, validate)
        return targets, None
    # All of this stays on the device: reading it would synchronize.
    sizes = gather(torch.full((1,), len(weight), dtype=torch.int64, device=device), process_group)[:, 0]
    check_targets(targets, rows, sizes.sum(), device, validate)
    return targets - sizes[: dist.get_rank(process_group)].sum(), partial(gather, process_group=process_group)
