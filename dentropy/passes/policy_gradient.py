"""The update a policy-gradient step would take, from rewarded rollouts.

The gradient is that of the token-mean surrogate at the policy that sampled the rollouts, where the probability ratio
is 1 and clipping does nothing:

    loss = −(1/D) Σ_i A_i Σ_k logp_k ,      A_i = (r_i − mean_g) / (std_g + 1e-4) over the rollouts of a prompt group,

k over the tokens that the policy generated, D of them, or with the batch's own advantages where it has them.
"""

import numpy as np
from torch import nn

from dentropy.model.adapter_layers import adapter_parameters
from dentropy.model.direction import Direction, checked_step_size
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.passes.measure import check_batch
from dentropy.passes.microbatches import AUTO
from dentropy.passes.optimizer_state import AdamW, saved_adamw
from dentropy.passes.reverse_mode import gradient
from dentropy.rollouts.batch import PackedBatch

OPTIMIZERS = ("sgd", "adamw")
ADVANTAGE_EPSILON = 1e-4  # the constant GRPO adds to a group's standard deviation
# Rewards of a group that differ by less, relative, are equal: sums taken in float32 may leave as much.
ROUNDING = 2.0**-20


@in_turn  # gradients stand at the parameters for a while
def policy_gradient_direction(
    policy: Policy,
    batch: PackedBatch,
    *,
    step_size: float,
    optimizer: str = "adamw",
    optimizer_state: dict | None = None,
    token_budget: int | str = AUTO,
    progress=None,
) -> Direction:
    """The direction of one policy-gradient step on `batch`, which needs advantages, or rewards and groups of several.

    The model and its gradients are left as found. Of a policy loaded with an adapter the adapter moves. The step is
    taken in float32 or better whatever the policy's dtype, as trainers with master weights do.

    Args:
        policy: at the weights that sampled the batch.
        batch: rollouts with rewards or advantages.
        step_size: the learning rate, kept as the direction's step_size.
        optimizer: "sgd" (v is minus the gradient) or "adamw" (without weight decay unless the state says otherwise).
        optimizer_state: the state_dict of an AdamW optimizer of this policy, saved in training; its moments, betas,
            eps and weight decay are used, and of its learning rates the ratios: with one rate v does not depend on
            it, with several step_size must be one of them (see `saved_adamw`). None means a fresh AdamW.
        token_budget, progress: as in `measure`.

    Raises:
        ValueError: without rewards, where rewards differ within no group, for rollouts the policy cannot take, and for
            a state that is not an AdamW's of this policy.

    Example:
        >>> from dentropy import PackedBatch
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> prompt, *answers = (tokenizer.encode(text) for text in ("2=", "1+1", "1+2"))
        >>> batch = PackedBatch.from_lists([prompt] * 2, answers, group=[0, 0], reward=[1, 0])
        >>> direction = policy_gradient_direction(policy, batch, step_size=1e-4)
        >>> direction.step_size, set(direction.tensors) == {name for name, _ in policy.model.named_parameters()}
        (0.0001, True)
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: {optimizer!r}, expected one of {OPTIMIZERS}")
    if optimizer == "sgd" and optimizer_state is not None:
        raise ValueError("optimizer_state: given with optimizer='sgd', which has none; expected optimizer='adamw'")
    step_size = checked_step_size(step_size)
    advantage = group_normalized_advantages(batch)
    check_batch(policy, batch)
    named = _trained(policy.model)
    if optimizer_state is None:
        adamw = dict.fromkeys(named, AdamW())
    else:
        adamw = saved_adamw(optimizer_state, {name: p.shape for name, p in named.items()}, step_size)
        named = {name: p for name, p in named.items() if name in adamw}
    # Weights of at most 1, and the rest of the scale afterwards: in half precision small gradients vanish.
    scale = abs(advantage).max()
    sums = gradient(
        policy,
        batch,
        list(named.values()),
        np.zeros(batch.n_tokens),
        by_token(batch, advantage / scale),
        token_budget=token_budget,
        progress=progress,
    )
    ascent = {name: total.mul_(scale / batch.n_tokens) for name, total in zip(named, sums, strict=True)}
    if optimizer == "sgd":
        return Direction(ascent, step_size)
    return Direction({name: adamw[name].step(p, -ascent[name]) for name, p in named.items()}, step_size)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an update would move: those that require gradients; of a model loaded with an adapter, which
    then has none of these, the active adapter's."""
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if not trained:
        trained = {name: named[name] for name, active in adapter_parameters(model).items() if active and name in named}
    if not trained:
        raise ValueError("policy: no parameter requires a gradient, expected some that an update would move")
    return trained


def by_token(batch: PackedBatch, advantage: np.ndarray) -> np.ndarray:
    """Advantages [S] or [n_tokens] as one for each generated token, [n_tokens]."""
    return np.repeat(advantage, batch.response_lens) if len(advantage) == len(batch) else advantage


def group_normalized_advantages(batch: PackedBatch) -> np.ndarray:
    """A_i, float64 [S]: the batch's advantages as they are (also [n_tokens], one for each generated token), else
    (r − mean)/(std + 1e-4) within each prompt group, 0 in groups of rewards that are equal up to rounding."""
    if batch.advantage is not None:
        if not batch.advantage.any():
            raise ValueError("batch: every advantage is 0, expected some that are not")
        return batch.advantage
    if batch.reward is None:
        raise ValueError("batch: no rewards, expected a reward for every rollout")
    _, group = np.unique(batch.group, return_inverse=True)
    count = np.bincount(group)
    low, high = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(low, group, batch.reward)
    np.maximum.at(high, group, batch.reward)
    equal = high - low <= ROUNDING * np.maximum(abs(low), abs(high))
    if equal.all():
        raise ValueError(
            "batch: rewards do not differ within any prompt group, so every advantage is 0; expected "
            "several rollouts per prompt with different rewards"
        )
    centred = np.where(equal[group], 0.0, batch.reward - (np.bincount(group, batch.reward) / count)[group])
    # the sample standard deviation; a group of one has none and its advantage is 0 anyway
    std = np.sqrt(np.bincount(group, centred**2) / np.maximum(count - 1, 1))
    return centred / (std + ADVANTAGE_EPSILON)[group]
