"""The forward-mode pass: rollouts through the policy, with or without tangents, to statistics of every generated token.

Weights are moved to θ + η·v by putting other tensors in the parameters' places; with a tangent those are dual tensors
whose tangent is v, and every operation of the model carries d/dη along. The parameters themselves are never written.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dentropy.model.direction import Direction
from dentropy.model.in_place import TURN
from dentropy.model.policy import Policy
from dentropy.model.shards import beside
from dentropy.passes.alone import blame_rollouts
from dentropy.passes.microbatches import Microbatch, TokenBudget, in_rollout_order, walk
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import TokenStats


def response_stats(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction | None,
    eta: float,
    *,
    tangent: bool,
    budget: TokenBudget,
    progress: Callable[[int], None] | None,
) -> TokenStats:
    """Statistics of every generated token, in rollout order, in one walk over the batch."""

    def score(microbatch: Microbatch) -> TokenStats:
        return policy.score(microbatch.row, microbatch.temperature, tangent=tangent)

    with policy.ready(), moved_weights(policy, direction, eta, tangent=tangent), torch.no_grad():
        idle = score if policy.is_sharded else None
        walked = walk(batch, budget, score, shared=True, idle=idle, in_unison=policy.in_unison)
        stats = in_rollout_order(walked, batch.n_tokens, progress)
        return blame_rollouts(stats, batch, budget, score)


@contextmanager
def moved_weights(policy: Policy, direction: Direction | None, eta: float, *, tangent: bool = False) -> Iterator[None]:
    """The policy's weights are θ + eta·v inside, and carry the tangent v if asked; θ itself is not touched.

    Use it to sample from, or score with, the policy an update would give. Passes of other threads wait until it ends.

    Args:
        policy: whose weights move.
        direction: v. None: they stay.
        eta: the step, in the direction's own units.
        tangent: whether the weights are dual tensors, with the tangent v.

    Raises:
        ValueError: as `Direction.on` does.

    Example:
        >>> from dentropy import Direction, sample
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> direction = Direction({"model.norm.weight": policy.model.model.norm.weight})
        >>> with moved_weights(policy, direction, eta=-0.5):    # half the logits
        ...     batch = sample(policy, [tokenizer.encode("17=")], per_prompt=2, max_new_tokens=5)
        >>> len(batch)
        2
    """
    if direction is None or (eta == 0 and not tangent):
        yield
        return

    def moved(primal: Tensor, v: Tensor, parameter: Tensor) -> Tensor:
        v = policy.as_it_stands(beside(v, parameter)).to(primal.dtype)
        if eta != 0:
            primal = torch.add(primal, v, alpha=eta)
        return forward_ad.make_dual(primal, v) if tangent else primal

    with (
        TURN,
        forward_ad.dual_level() if tangent else nullcontext(),
        policy.in_place({id(p): partial(moved, v=v, parameter=p) for p, v in policy.moving(direction)}),
    ):
        yield
