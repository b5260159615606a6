"""The update a policy-gradient step would take, from rewarded rollouts: its gradient, its optimizer, its direction.

Of the loss that `PolicyLoss` names the gradient is g = Σ_j (a_j ∇logp_j + e_j ∇h_j) over the tokens of the rollouts. By
default that is the token-mean surrogate at the policy that sampled them, where the probability ratio is 1 and clipping
does nothing:

    loss = −(1/D) Σ_i A_i Σ_k logp_k ,      A_i = (r_i − mean_g) / (std_g + 1e-4) over the rollouts of a prompt group,

k over the tokens that the policy generated, D of them, or with the batch's own advantages where it has them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real

import numpy as np
from torch import Tensor, nn

from dentropy.model.adapter_layers import adapter_parameters
from dentropy.model.direction import Direction, checked_step_size
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.model.shards import dot
from dentropy.passes.measure import check_batch, measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.optimizer_state import NOT_DIAGONAL, OPTIMIZERS, SGD, AdamW, Parts, saved_optimizer
from dentropy.passes.policy_loss import Coefficients, PolicyLoss, coefficients
from dentropy.passes.reverse_mode import gradient
from dentropy.rollouts.batch import PackedBatch

CLIP_EPSILON = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


@dataclass(frozen=True, eq=False)
class PolicyGradientStep:
    """One optimizer step on a batch, not taken: all that its direction is made of.

    Attributes:
        policy: whose step it is, at the weights before it.
        batch: the update's rollouts.
        loss: what it is a step on.
        coefficients: of the loss, for each of their tokens.
        gradient: of the loss, clipped, by parameter name, float32 or better.
        clip_factor: κ = min(1, c/(‖g‖ + 1e-6)) of a gradient norm clipped at c; 1.0 where it was not.
        optimizer: its name.
        rules: the optimizer of each parameter, by the same names.
        step_size: the learning rate.
        max_grad_norm: c; None where nothing is clipped.
    """

    policy: Policy
    batch: PackedBatch
    loss: PolicyLoss
    coefficients: Coefficients
    gradient: dict[str, Tensor]
    clip_factor: float
    optimizer: str
    rules: dict[str, SGD | AdamW]
    step_size: float
    max_grad_norm: float | None = None

    def parts(self, name: str) -> Parts:
        """What the step of one parameter is made of."""
        return self.rules[name].parts(self.policy.model.get_parameter(name), self.gradient[name])

    def direction(self) -> Direction:
        """v of the step."""
        return Direction({name: self.parts(name).step(g) for name, g in self.gradient.items()}, self.step_size)


def policy_gradient_direction(policy: Policy, batch: PackedBatch, **settings) -> Direction:
    """The direction of one policy-gradient step on `batch`, which needs advantages, or rewards and groups of several.

    Arguments and errors are those of `policy_gradient_step`, whose direction it is.

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
    return policy_gradient_step(policy, batch, **settings).direction()


@in_turn  # gradients stand at the parameters for a while
def policy_gradient_step(
    policy: Policy,
    batch: PackedBatch,
    *,
    step_size: float,
    loss: PolicyLoss | None = None,
    optimizer: str = "adamw",
    optimizer_state: dict | None = None,
    max_grad_norm: float | None = None,
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> PolicyGradientStep:
    """One step of an optimizer on `batch`, which needs advantages, or rewards and groups of several.

    The model and its gradients are left as found. Of a policy loaded with an adapter the adapter moves. The step is
    taken in float32 or better whatever the policy's dtype, as trainers with master weights do. It takes one reverse
    pass over the batch and, where the loss has old or reference log-probabilities, a plain one before.

    Args:
        policy: at the weights before the step.
        batch: rollouts with rewards or advantages.
        step_size: the learning rate, kept as the direction's step_size.
        loss: None is `PolicyLoss()`: ratios of 1, the mean over tokens.
        optimizer: "sgd" (without a state v is minus the gradient), "adamw" or "adam" (without weight decay unless the
            state says otherwise).
        optimizer_state: the state_dict of such an optimizer of this policy, saved in training; its moments, betas,
            eps, momentum and weight decay are used, and of its learning rates the ratios: with one rate v does not
            depend on it, with several step_size must be one of them (see `saved_optimizer`). None means a fresh one.
            Its tensors are not copied: of an optimizer that steps before the result is used up, give a copy.
        max_grad_norm: c, what the gradient's norm is clipped at before the step.
        token_budget, progress: as in `measure`; progress counts the tokens of every pass.

    Raises:
        ValueError: without rewards, where rewards differ within no group, for rollouts the policy cannot take, for a
            state that is not such an optimizer's of this policy, and for optimizers such as Muon whose step is not a
            diagonal times the gradient.
    """
    if optimizer not in OPTIMIZERS:
        reason = f" ({NOT_DIAGONAL})" if str(optimizer).lower() == "muon" else ""
        raise ValueError(f"optimizer: {optimizer!r}{reason}, expected one of {OPTIMIZERS}")
    if max_grad_norm is not None and not (isinstance(max_grad_norm, Real) and 0 < max_grad_norm < float("inf")):
        raise ValueError(f"max_grad_norm: {max_grad_norm!r}, expected a positive number")
    step_size, loss = checked_step_size(step_size), PolicyLoss() if loss is None else loss
    check_batch(policy, batch)
    named = trained_parameters(policy.model)
    if optimizer_state is None:
        rules = dict.fromkeys(named, SGD() if optimizer == "sgd" else AdamW(coupled=optimizer == "adam"))
    else:
        rules = saved_optimizer(optimizer, optimizer_state, {name: p.shape for name, p in named.items()}, step_size)
        named = {name: p for name, p in named.items() if name in rules}
    settings = {"token_budget": token_budget, "progress": progress}
    logp = None
    if loss.needs_logp:
        logp = measure(policy, batch, keep_tokens=True, **settings).tokens.logp.double().numpy()
    found = coefficients(loss, batch, logp)
    gradients = loss_gradient(policy, batch, found, named, **settings)
    gradients, clip_factor = clipped(gradients, max_grad_norm)
    return PolicyGradientStep(
        policy, batch, loss, found, gradients, clip_factor, optimizer, rules, step_size, max_grad_norm=max_grad_norm
    )


def loss_gradient(
    policy: Policy, batch: PackedBatch, found: Coefficients, names: Iterable[str], **settings
) -> dict[str, Tensor]:
    """That of the loss, at the parameters `names`; settings are token_budget and progress."""
    names = list(names)
    parameters = [policy.model.get_parameter(name) for name in names]
    entropy = np.zeros(batch.n_tokens) if found.entropy is None else found.entropy
    # Weights of at most 1, and the rest of the scale afterwards: in half precision small gradients vanish.
    scale = max(abs(found.logp).max(initial=0.0), abs(entropy).max(initial=0.0)) or 1.0
    sums = gradient(policy, batch, parameters, entropy / scale, found.logp / scale, **settings)
    return {name: total.mul_(scale) for name, total in zip(names, sums, strict=True)}


def clipped(gradients: dict[str, Tensor], max_norm: float | None) -> tuple[dict[str, Tensor], float]:
    """The gradients times κ = min(1, c/(‖g‖ + 1e-6)), in place, and κ; as they are, and 1.0, for a c of None."""
    if max_norm is None:
        return gradients, 1.0
    norm = sum(dot(g, g) for g in gradients.values()) ** 0.5
    factor = min(1.0, max_norm / (norm + CLIP_EPSILON))
    return {name: g.mul_(factor) for name, g in gradients.items()}, factor


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an update would move: those that require gradients; of a model loaded with an adapter, which
    then has none of these, the active adapter's."""
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if not trained:
        trained = {name: named[name] for name, active in adapter_parameters(model).items() if active and name in named}
    if not trained:
        raise ValueError("policy: no parameter requires a gradient, expected some that an update would move")
    return trained
