"""The entropy bonus that makes a step change entropy by a given amount, and the step with it.

With the loss less λR̂, R̂'s gradient b, the step's gradient is g − λb. With P and the clipping held as they are the step
is v + λ γκP∘b: linear in λ, and so is its slope. For an SGD without clipping that is the step; for others it is solved
again with the P and κ that the first λ gives.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dentropy.estimators import Estimate, slope
from dentropy.estimators.bonus import BonusCoefficient, bonus_coefficient
from dentropy.model.direction import Direction
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.optimizer_state import SGD
from dentropy.passes.policy_gradient import PolicyGradientStep, clipped
from dentropy.rollouts.batch import PackedBatch


@dataclass(frozen=True, eq=False)
class EntropyBonus:
    """A bonus for a target.

    Attributes:
        coefficient: λ*, with its interval.
        update, bonus: the slopes of the step without the bonus and of γκP∘b, P and κ those of the last solution.
        step: the step with the bonus, not taken.
    """

    coefficient: BonusCoefficient
    update: Estimate
    bonus: Estimate
    step: PolicyGradientStep


@in_turn
def bonus_for(
    target: float,
    policy: Policy,
    batch: PackedBatch,
    update: PolicyGradientStep,
    bonus: Direction,
    *,
    estimator: str = "causal",
    per: str = "token",
    prompts: str = "random",
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> EntropyBonus:
    """The coefficient of `bonus` with which the step is predicted, at first order, to change entropy by `target`.

    It takes two passes with tangents; of an Adam, or where the gradient's norm is clipped, two more.

    Args:
        target: ΔH of the step in nats per token (or sequence).
        policy, batch: to judge on: rollouts that made neither the step nor the bonus.
        update: `policy_gradient_step(...)` without the bonus.
        bonus: the gradient b of what the loss is made less by, as `entropy_gradient(policy, update.batch)`: of other
            rollouts than `batch`, for on its own a gradient looks larger than it is.
        estimator, per, prompts: as in `slope`.
        token_budget, progress: as in `measure`.

    Raises:
        ValueError: as `measure`, `slope` and `bonus_coefficient` do; a step of another policy; a bonus at parameters
            that the step does not move.

    Example:
        >>> from dentropy import PackedBatch, bonus_for, entropy_gradient, measure, policy_gradient_step, sample, slope
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = sample(policy, [tokenizer.encode(text) for text in ("17=", "4=")], per_prompt=4, max_new_tokens=9)
        >>> prompt, *answers = (tokenizer.encode(text) for text in ("2=", "1+1", "1+2"))
        >>> rewarded = PackedBatch.from_lists([prompt] * 2, answers, group=[0, 0], reward=[1, 0])
        >>> step = policy_gradient_step(policy, rewarded, step_size=1e-4, optimizer="sgd")
        >>> found = bonus_for(0.0, policy, batch, step, entropy_gradient(policy, rewarded))
        >>> held = slope(measure(policy, batch, found.step.direction())).value
        >>> bool(abs(held) < 1e-3 * abs(found.update.value))
        True
    """
    if update.policy is not policy:
        raise ValueError("update: a step of another policy, expected one made with this Policy")
    _check_bonus(update, bonus)
    settings = {"token_budget": token_budget, "progress": progress}
    form = {"estimator": estimator, "per": per, "prompts": prompts}

    def slope_along(direction: Direction) -> Estimate:
        return slope(measure(policy, batch, direction, **settings), **form)

    def solved(without: Direction, along: Direction) -> tuple[BonusCoefficient, Estimate, Estimate]:
        first, second = slope_along(without), slope_along(along)
        return bonus_coefficient(target, first, second, eta=update.step_size), first, second

    found = solved(update.direction(), _along(update, bonus))
    if not _is_linear(update):
        at = step_with_bonus(update, bonus, found[0].value)
        along = _along(at, bonus)
        found = solved(_less(at.direction(), along, found[0].value), along)
    return EntropyBonus(*found, step_with_bonus(update, bonus, found[0].value))


def step_with_bonus(update: PolicyGradientStep, bonus: Direction, coefficient: float) -> PolicyGradientStep:
    """The step on the loss less λ times what `bonus` is the gradient of: clipping and optimizer solved anew.

    Its `coefficients` remain those of the loss without the bonus.
    """
    _check_bonus(update, bonus)
    gradients = {
        name: g / update.clip_factor - coefficient * bonus.tensors[name].to(g)
        if name in bonus.tensors
        else g / update.clip_factor
        for name, g in update.gradient.items()
    }
    gradients, clip_factor = clipped(gradients, update.max_grad_norm)
    return replace(update, gradient=gradients, clip_factor=clip_factor)


def _along(update: PolicyGradientStep, bonus: Direction) -> Direction:
    """γκP∘b at the step's own P and κ."""
    names = [name for name in update.gradient if name in bonus.tensors]
    return Direction(
        {
            name: update.clip_factor * update.parts(name).gain * bonus.tensors[name].to(update.gradient[name])
            for name in names
        },
        update.step_size,
    )


def _less(direction: Direction, along: Direction, coefficient: float) -> Direction:
    """v − λ v_b."""
    tensors = {
        name: v - coefficient * along.tensors[name] if name in along.tensors else v
        for name, v in direction.tensors.items()
    }
    return Direction(tensors, direction.step_size)


def _is_linear(update: PolicyGradientStep) -> bool:
    """Whether the step is linear in its gradient."""
    return update.max_grad_norm is None and all(isinstance(rule, SGD) for rule in update.rules.values())


def _check_bonus(update: PolicyGradientStep, bonus: Direction) -> None:
    unknown = [name for name in bonus.tensors if name not in update.gradient]
    if unknown:
        raise ValueError(f"bonus: {unknown[0]} is no parameter that the step moves, expected its parameters alone")
