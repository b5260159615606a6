"""Exact second derivatives: torch.func's forward mode nested in itself, through plain PyTorch arithmetic.

Slower and hungrier than the central difference of the first-order pass, and free of its step: for models whose
derivatives jump (experts chosen by rank), and to check the difference by.
"""

import torch
from torch import Tensor
from torch.func import jvp
from torch.overrides import TorchFunctionMode

from dentropy.model import attention
from dentropy.model.in_place import in_place_of_parameters
from dentropy.model.packed_row import PackedRow
from dentropy.passes.alone import blame_rollouts
from dentropy.passes.microbatches import Microbatch, in_rollout_order, walk
from dentropy.stats import plain
from dentropy.stats.tables import TokenStats


def nested_response_stats(policy, batch, direction, eta, *, budget, progress) -> TokenStats:
    """Statistics of every generated token with both derivatives along `direction`, in rollout order."""
    moving = policy.moving(direction)

    def score(microbatch: Microbatch) -> TokenStats:
        return _score(policy, microbatch.row, moving, eta, microbatch.temperature)

    # Some derivatives (silu's) are differentiable again only while gradients are enabled; no weight asks for one.
    with policy.ready(attention.NESTABLE), torch.enable_grad(), _NestableLayerNorm():
        stats = in_rollout_order(walk(batch, budget, score, shared=True), batch.n_tokens, progress)
        return blame_rollouts(stats, batch, budget, score)


def _score(policy, row: PackedRow, moving, eta: float, temperature: float) -> TokenStats:
    def logits(at: Tensor) -> Tensor:
        moved = {id(p): p.detach() for p in policy.model.parameters()}
        moved |= {id(p): p.detach() + at.to(p.dtype) * v for p, v in moving}
        with in_place_of_parameters(policy.model, moved):
            return policy.logits(row)[row.rows]

    at, one = (torch.full((), x, dtype=torch.float64, device=policy.device) for x in (eta, 1.0))
    try:
        (z, dz), (_, ddz) = jvp(lambda at: jvp(logits, (at,), (one,)), (at,), (one,))
    except NotImplementedError as error:
        raise ValueError(
            f"second_order: 'nested' finds an operation without it ({str(error).splitlines()[0]}), expected "
            "'difference' for this policy"
        ) from error
    return plain.token_stats(z, row.targets, dz, ddz, temperature=temperature)


class _NestableLayerNorm(TorchFunctionMode):
    """Nested forward mode through F.layer_norm is wrong without a word; through its arithmetic it is exact."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.nn.functional.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, _cudnn=True):
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias
