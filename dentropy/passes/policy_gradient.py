"""The update a policy-gradient step would take, from rewarded rollouts.

The gradient is that of the token-mean surrogate at the policy that sampled the rollouts, where the probability ratio
is 1 and clipping does nothing:

    loss = −(1/D) Σ_i A_i Σ_k logp_k ,      A_i = (r_i − mean_g) / (std_g + 1e-4) over the rollouts of a prompt group.
"""

import numpy as np
import torch
from torch import nn

from dentropy.model.direction import Direction
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.passes.microbatches import AUTO
from dentropy.passes.reverse_mode import gradient
from dentropy.rollouts.batch import PackedBatch

OPTIMIZERS = ("sgd", "adamw")
ADVANTAGE_EPSILON = 1e-4  # the constant GRPO adds to a group's standard deviation


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
    """The direction of one policy-gradient step on `batch`, which needs rewards and groups of several rollouts.

    The model and its gradients are left as found.

    Args:
        policy: at the weights that sampled the batch.
        batch: rollouts with rewards.
        step_size: the learning rate, kept as the direction's step_size.
        optimizer: "sgd" (v is minus the gradient) or "adamw" (without weight decay unless the state says otherwise).
        optimizer_state: the state_dict of an AdamW optimizer of this policy, saved in training; its moments, betas,
            eps and weight decay are used, its learning rate is not: v does not depend on one. None means a fresh AdamW.
        token_budget, progress: as in `measure`.

    Raises:
        ValueError: without rewards, where rewards differ within no group, and for a state that does not fit.

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
    advantage = group_normalized_advantages(batch)
    batch.check_vocabulary(policy.vocab_size)
    named = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    if not parameters:
        raise ValueError("policy: no parameter requires a gradient, expected some that an update would move")
    adamw = None if optimizer == "sgd" else _adamw(parameters, optimizer_state)
    token_advantage = np.repeat(advantage, batch.response_lens) / batch.n_tokens
    ascent = gradient(
        policy,
        batch,
        parameters,
        np.zeros(batch.n_tokens),
        token_advantage,
        token_budget=token_budget,
        progress=progress,
    )
    if adamw is None:
        return Direction(dict(zip(named, ascent, strict=True)), step_size)
    found = [p.grad for p in parameters]
    try:
        for p, g in zip(parameters, ascent, strict=True):
            p.grad = -g.to(p.dtype)
        # AdamW's step, weight decay included, is linear in the learning rate. At 1 the difference of weights keeps
        # its digits; at 1e-6 float32 would round away a thousandth of it.
        return Direction(Direction.from_optimizer_step(policy.model, adamw, 1.0).tensors, step_size)
    finally:
        for p, grad in zip(parameters, found, strict=True):
            p.grad = grad


def group_normalized_advantages(batch: PackedBatch) -> np.ndarray:
    """(r − mean)/(std + 1e-4) within each prompt group, float64 [S]; 0 in groups of equal rewards."""
    if batch.reward is None:
        raise ValueError("batch: no rewards, expected a reward for every rollout")
    _, group = np.unique(batch.group, return_inverse=True)
    count = np.bincount(group)
    centred = batch.reward - (np.bincount(group, batch.reward) / count)[group]
    # the sample standard deviation; a group of one has none and its advantage is 0 anyway
    std = np.sqrt(np.bincount(group, centred**2) / np.maximum(count - 1, 1))
    if not std.any():
        raise ValueError(
            "batch: rewards do not differ within any prompt group, so every advantage is 0; expected "
            "several rollouts per prompt with different rewards"
        )
    return centred / (std + ADVANTAGE_EPSILON)[group]


def _adamw(parameters: list[nn.Parameter], state: dict | None) -> torch.optim.AdamW:
    if state is None:
        return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    sizes = [len(group["params"]) for group in state.get("param_groups", [])]
    if sum(sizes) != len(parameters):
        raise ValueError(f"optimizer_state: for {sum(sizes)} parameters, expected the policy's {len(parameters)}")
    # One group holds the parameters in the model's order; two are the usual split into weights, which decay, and
    # biases and norms, which do not, each in the model's order.
    ordered = parameters if len(sizes) == 1 else sorted(parameters, key=lambda p: p.ndim < 2)
    groups, start = [], 0
    for size in sizes:
        groups.append({"params": ordered[start : start + size]})
        start += size
    if any(group.get("decoupled_weight_decay") is False and group["weight_decay"] for group in state["param_groups"]):
        raise ValueError("optimizer_state: of an Adam with coupled weight decay, expected an AdamW's")
    _check_moments(state, ordered)
    adamw = torch.optim.AdamW(groups, lr=1.0)
    adamw.load_state_dict(state)
    for group in adamw.param_groups:
        group["lr"] = 1.0
    return adamw


def _check_moments(state: dict, ordered: list[nn.Parameter]) -> None:
    keys = [key for group in state["param_groups"] for key in group["params"]]
    for key, parameter in zip(keys, ordered, strict=True):
        moments = state["state"].get(key)
        if moments is None:
            continue  # a parameter that never had a gradient
        shape = tuple(moments["exp_avg"].shape) if "exp_avg" in moments else None
        if shape != tuple(parameter.shape):
            raise ValueError(
                f"optimizer_state: first moment {key} has shape {shape}, expected "
                f"{tuple(parameter.shape)}; the state must be an AdamW's over this policy's parameters in "
                "their order, in one group or split into weights and biases and norms"
            )
