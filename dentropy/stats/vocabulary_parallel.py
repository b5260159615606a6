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
