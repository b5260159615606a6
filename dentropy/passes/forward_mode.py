"""The forward-mode pass: rollouts through the policy, with or without tangents, to statistics of every response token.

Weights are moved to θ + η·v by putting other tensors in the parameters' places; with a tangent those are dual tensors
whose tangent is v, and every operation of the model carries d/dη along. The parameters themselves are never written.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dentropy.model.direction import Direction
from dentropy.model.policy import Policy
from dentropy.passes.microbatches import packed_inputs, stats_in_rollout_order
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import TokenStats
from dentropy.stats.token_stats import linear_token_stats, token_stats


def response_stats(policy, batch, direction, eta, *, tangent, budget, progress) -> TokenStats:
    """Statistics of every response token, in rollout order, in one walk over the batch."""
    with policy.ready(), moved_weights(policy, direction, eta, tangent=tangent), torch.no_grad():
        return stats_in_rollout_order(
            batch, budget, lambda rollouts: _score(policy, batch, rollouts, tangent), progress
        )


@contextmanager
def moved_weights(policy: Policy, direction: Direction | None, eta: float, *, tangent: bool = False) -> Iterator[None]:
    """The policy's weights are θ + eta·v inside, and carry the tangent v if asked; θ itself is not touched.

    Use it to sample from, or score with, the policy an update would give:

    >>> with moved_weights(policy, direction, eta=1e-6):           # doctest: +SKIP
    ...     rollouts = sample(policy, prompts, per_prompt=4, max_new_tokens=64)
    """
    if direction is None or (eta == 0 and not tangent):
        yield
        return
    moved: dict[int, Tensor] = {}
    with forward_ad.dual_level() if tangent else nullcontext():
        for parameter, v in direction.on(policy.model):
            primal = parameter.detach()
            if eta != 0:
                primal = torch.add(primal, v, alpha=eta)
            moved[id(parameter)] = forward_ad.make_dual(primal, v) if tangent else primal
        with in_place_of_parameters(policy.model, moved):
            yield


@contextmanager
def in_place_of_parameters(model: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Puts tensors where the parameters with these id()s stand. A tied parameter is replaced wherever it is used."""
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in tensors
    ]
    try:
        for parameters, name, parameter in places:
            parameters[name] = tensors[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


def _score(policy: Policy, batch: PackedBatch, rollouts: np.ndarray, tangent: bool) -> TokenStats:
    """Token statistics of the response tokens of `rollouts`, one microbatch."""
    tokens, cu_seqlens, rows, targets = packed_inputs(batch, rollouts, policy.device)
    try:
        outputs = (policy.hidden if policy.splits_head else policy.logits)(tokens, cu_seqlens)
    except NotImplementedError as error:
        raise ValueError(
            f"policy: {type(policy.model).__name__} has an operation without forward mode "
            f"({str(error).splitlines()[0]}); load it with attn_implementation='eager' and "
            "experts_implementation='eager', and without fused kernels of its own"
        ) from error
    x, dx = (None if part is None else part[rows] for part in forward_ad.unpack_dual(outputs))
    if not policy.splits_head:
        return token_stats(x, targets, _tangent(x, dx, tangent), temperature=batch.temperature)
    head = policy.head()
    weight, dweight = forward_ad.unpack_dual(head.weight)
    bias, dbias = (None, None) if head.bias is None else forward_ad.unpack_dual(head.bias)
    if dweight is None and dbias is None:
        dx = _tangent(x, dx, tangent)
    # softcap(scale·z)/temperature, with the scale folded into the two constants
    return linear_token_stats(
        x,
        weight,
        targets,
        dx,
        dweight,
        bias=bias,
        dbias=dbias,
        temperature=batch.temperature / head.scale,
        softcap=None if head.softcap is None else head.softcap / head.scale,
    )


def _tangent(x: Tensor, dx: Tensor | None, wanted: bool) -> Tensor | None:
    """Where nothing that moves reaches these tokens (an expert nobody visits) the derivative is 0, not missing."""
    return torch.zeros_like(x) if wanted and dx is None else dx
