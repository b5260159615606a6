"""Reverse mode where parameters are sharded over ranks: each rank gets its part of the gradient of all of them.

FSDP's backward gives every rank its shard of the mean over ranks, in `.grad`; autograd.grad on the shards would find
nothing and say so by None. Ranks run a microbatch each, those without one another's with the weight 0, and the mean
times their number is the sum.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dentropy.model.shards import is_shard, own_part
from dentropy.passes import ranks
from dentropy.passes.microbatches import Microbatch, TokenBudget, walk
from dentropy.rollouts.batch import PackedBatch


def add_sharded_gradient(
    policy,
    batch: PackedBatch,
    parameters: Sequence[nn.Parameter],
    total: list[Tensor],
    value: Callable[[Microbatch], Tensor],
    budget: TokenBudget,
    progress: Callable[[int], None] | None,
) -> None:
    """Adds the gradient of Σ value(microbatch), over all ranks, to `total`, in parts as the parameters are. The model
    and its .grad are left as found."""
    if not all(map(is_shard, parameters)):
        raise ValueError("parameters: whole ones of a sharded model, expected it between steps, at rest")
    all_parameters = list(policy.model.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    before = [p.grad for p in all_parameters]

    def run(microbatch: Microbatch, weight: float = 1.0) -> None:
        for p in all_parameters:
            p.grad = None
        (weight * value(microbatch)).backward()
        for sum_, p in zip(total, parameters, strict=True):
            if p.grad is not None:
                own_part(sum_).add_(own_part(p.grad), alpha=ranks.count())

    try:
        for p in frozen:
            p.requires_grad_(True)
        with policy.ready(), torch.enable_grad():
            for microbatch, _ in walk(batch, budget, run, idle=lambda microbatch: run(microbatch, 0.0)):
                if progress is not None:
                    progress(len(microbatch.places))
    finally:
        for p, grad in zip(all_parameters, before, strict=True):
            p.grad = grad
        for p in frozen:
            p.requires_grad_(False)
