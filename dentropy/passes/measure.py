"""`measure`: rollouts and a policy to the table that everything statistical is computed from."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from numbers import Real

import numpy as np
import torch

from dentropy.model.direction import Direction
from dentropy.model.fingerprint import fingerprint
from dentropy.model.policy import Policy
from dentropy.model.shards import is_shard
from dentropy.passes import ranks
from dentropy.passes.first_rollouts import check_on_first
from dentropy.passes.forward_mode import response_stats
from dentropy.passes.microbatches import AUTO, TokenBudget
from dentropy.passes.nested import nested_response_stats
from dentropy.passes.second_order import difference_step, doubt, with_second_order
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.segments import segment_sum
from dentropy.stats.sequence_sums import sequence_sums
from dentropy.stats.tables import SequenceSums, TokenStats

SECOND_ORDER = ("difference", "nested")


@ranks.together
def measure(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction | None = None,
    *,
    eta: float = 0.0,
    order: int | None = None,
    token_budget: int | str = AUTO,
    keep_tokens: bool = False,
    second_order: str = "difference",
    progress: Callable[[int], None] | None = None,
) -> SequenceSums:
    """One row per rollout: log-probability, entropy and their derivatives along `direction`, summed over tokens.

    The tokens are those that the policy generated; given ones, before or between them, are context.
    The policy is taken at θ + eta·v, v the direction; sums are in nats, derivatives in nats per unit of η.

    In a process group (torch.distributed) every rank must call this, with the same policy, batch and settings: each
    runs its part of the microbatches, and all of them get the table of one process, bit for bit at an equal budget
    with the same threads and device. (Of a tensor parallel policy they run its parts of all of them.) What one rank
    fails with ends it on all.

    Args:
        policy: the model; it is left as found.
        batch: rollouts of it, or of another policy; with its `sampler_logp` every estimator weighs them as the policy's
            own (see `base_weights`), without it they are taken for its own.
        direction: v; None for order 0 at eta = 0.
        eta: the step along v.
        order: 0 for logp and entropy only, 1 for their derivatives too, 2 for the second ones as well; None means 1
            with a direction at eta = 0, else 0.
        token_budget: tokens, given and generated, run at a time (a longer rollout runs alone). Memory follows it;
            results do not, beyond rounding. "auto" is 4096 on a CPU, where more is no faster; on CUDA it measures the
            memory of a first microbatch of that size, which resets PyTorch's peak statistics, and then fills a safe
            share of what is free. Where memory runs out the budget is halved, with a warning, and what is done is
            kept.
        keep_tokens: also keep the per-token values, packed, on the CPU, as `.tokens`.
        second_order: "difference" takes second differences of the values along v (two more passes, without
            tangents; the column `second_order_step` says how far from `eta`), a few percent off at worst where the
            policy is smooth; "nested" takes forward mode through forward mode, exact and some times slower, in
            plain PyTorch.
        progress: called after every microbatch with the number of generated tokens it held.

    Raises:
        ValueError: for token ids outside the vocabulary, rollouts longer than the policy's positions, a direction
            that does not fit the policy, values that are not finite (naming the rollout), and, at a policy's first
            batch, where its own forward and the pass differ on it.
        MemoryError: for a rollout that does not fit into memory alone, and with sharded weights for a token budget that
            does not.

    Example:
        >>> from dentropy import sample
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = sample(policy, [tokenizer.encode("17=")], per_prompt=4, max_new_tokens=33)
        >>> direction = Direction({"model.norm.weight": policy.model.model.norm.weight})
        >>> sums = measure(policy, batch, direction)
        >>> len(sums), bool(sums.dentropy.sum() < 0)    # larger logits, less entropy
        (4, True)
    """
    order = (1 if direction is not None and eta == 0 else 0) if order is None else order
    _check_request(policy, batch, direction, eta, order, second_order)
    if ranks.count() > 1:
        ranks.agree("eta, order, second_order", (eta, order, second_order))
        ranks.agree("direction", None if direction is None else _told_apart(direction))
    settings = dict(budget=TokenBudget(token_budget, policy.device), progress=progress)
    check_on_first(policy, batch)

    step = None
    if order == 2 and second_order == "nested":
        stats = nested_response_stats(policy, batch, direction, eta, **settings)
    else:
        stats = response_stats(policy, batch, direction, eta, tangent=order > 0, **settings)
    if order == 2 and second_order == "difference":
        step = difference_step(stats, policy.dtype)
        sides = [
            response_stats(policy, batch, direction, at, tangent=False, **settings) for at in (eta + step, eta - step)
        ]
        if reason := doubt(stats, *sides, step):
            warnings.warn(f"order=2: {reason}", stacklevel=2)
        stats = with_second_order(stats, *sides, step)
    sums = sequence_sums(stats, batch.response_offsets, group=batch.group)
    tokens = TokenStats(*(None if x is None else x.cpu() for x in stats)) if keep_tokens else None
    return replace(
        sums,
        tokens=tokens,
        second_order_step=None if step is None else np.full(len(batch), step),
        **_of_sampler(batch, keep_tokens),
    )


def _told_apart(direction: Direction) -> tuple:
    """What ranks compare: content, of what they hold in parts the names."""
    parts = {name for name, v in direction.tensors.items() if is_shard(v)}
    return parts, fingerprint((name, v) for name, v in direction.tensors.items() if name not in parts)


def _of_sampler(batch: PackedBatch, keep_tokens: bool) -> dict[str, np.ndarray]:
    """What the batch says of its sampler, for the table: nothing where it says nothing."""
    if batch.sampler_logp is None:
        return {}
    found = {"sampler_logp": segment_sum(batch.sampler_logp, batch.response_offsets)}
    return found | ({"sampler_tokens": batch.sampler_logp} if keep_tokens else {})


def _check_request(policy, batch, direction, eta, order, second_order) -> None:
    if not isinstance(eta, Real) or not math.isfinite(eta):
        raise ValueError(f"eta: {eta}, expected a finite number")
    if order not in (0, 1, 2):
        raise ValueError(f"order: {order!r}, expected 0, 1 or 2")
    if second_order not in SECOND_ORDER:
        raise ValueError(f"second_order: {second_order!r}, expected one of {SECOND_ORDER}")
    if order == 2 and second_order == "nested" and policy.is_sharded:
        raise ValueError("second_order: 'nested' for sharded weights, expected 'difference'")
    if direction is None and (order or eta != 0):
        raise ValueError(f"direction: None, expected a Direction for order={order}, eta={eta}")
    check_batch(policy, batch)
    half = torch.finfo(policy.dtype).bits < 32
    if order == 2 and half:
        raise ValueError(
            f"order: 2 with weights in {policy.dtype}, where second derivatives drown in rounding, expected the "
            "policy loaded with dtype=torch.float32"
        )
    if eta != 0 and half:
        warnings.warn(
            f"policy: weights are {policy.dtype}, in which updates below 1/256 of a weight vanish; load the "
            "policy with dtype=torch.float32 to measure at eta != 0",
            stacklevel=3,
        )


def check_batch(policy: Policy, batch: PackedBatch) -> None:
    """ValueError naming the first rollout with a token, or with positions, that the policy does not have."""
    batch.check_vocabulary(policy.vocab_size)
    longest = int(np.argmax(batch.row_lens))
    length = int(batch.row_lens[longest])
    if policy.max_positions is not None and length > policy.max_positions:
        raise ValueError(f"rollout {longest}: {length} tokens, expected at most {policy.max_positions} positions")
