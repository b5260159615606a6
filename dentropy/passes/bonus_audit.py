"""What the entropy bonus of an update does: the update with it against the update without."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dentropy.estimators import Estimate, slope
from dentropy.model.direction import Direction
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.model.shards import dot
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.parameter_attribution import moving_by_name
from dentropy.rollouts.batch import PackedBatch

# A bonus that moves weights by less of the update is what the rounding of float32 leaves, added up over an update.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class BonusAudit:
    """What a bonus makes of an update, in nats per token (or sequence) per unit of η.

    Attributes:
        relative_size: ‖v_with − v_without‖ / ‖v_with‖.
        whole: the slope along the update with the bonus.
        bonus: that along what the bonus adds to it; None where it adds nothing.
        verdict: in words.
    """

    relative_size: float
    whole: Estimate
    bonus: Estimate | None
    verdict: str


@in_turn
def bonus_audit(
    policy: Policy,
    batch: PackedBatch,
    with_bonus: Direction,
    without: Direction,
    *,
    estimator: str = "causal",
    per: str = "token",
    prompts: str = "random",
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> BonusAudit:
    """How much of an update's change of entropy its bonus makes, and whether it does anything at all.

    A bonus may do nothing: computed where gradients are off, or dropped by a backward pass in chunks. Two passes with
    tangents, or one where the updates are equal but for rounding.

    Args:
        policy, batch: to judge on, rollouts that did not make the updates.
        with_bonus, without: the two updates from the same weights, optimizer state and rollouts, of one step_size: by
            `Direction.from_optimizer_step`, `Direction.between` or `PolicyGradientStep.direction`.
        estimator, per, prompts: as in `slope`.
        token_budget, progress: as in `measure`.

    Raises:
        ValueError: as `measure` and `slope` do; step sizes that differ.

    Example:
        >>> from dentropy import PackedBatch, PolicyLoss, bonus_audit, policy_gradient_direction, sample
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = sample(policy, [tokenizer.encode(text) for text in ("17=", "4=")], per_prompt=4, max_new_tokens=9)
        >>> prompt, *answers = (tokenizer.encode(text) for text in ("2=", "1+1", "1+2"))
        >>> rewarded = PackedBatch.from_lists([prompt] * 2, answers, group=[0, 0], reward=[1, 0])
        >>> plain = policy_gradient_direction(policy, rewarded, step_size=1e-4, optimizer="sgd")
        >>> bonus_audit(policy, batch, plain, plain).verdict
        'the bonus does nothing: the update is the same without it'
    """
    if with_bonus.step_size != without.step_size:
        raise ValueError(
            f"without: step_size {without.step_size:g}, expected {with_bonus.step_size:g} as with_bonus has"
        )
    settings, form = {"token_budget": token_budget, "progress": progress}, dict(per=per, prompts=prompts)
    both = moving_by_name(policy, with_bonus), moving_by_name(policy, without)
    added = {name: _at(both[0], name, both) - _at(both[1], name, both) for name in {**both[0], **both[1]}}
    size, norm = (sum(dot(v, v) for v in vs.values()) ** 0.5 for vs in (added, both[0]))
    whole = slope(measure(policy, batch, with_bonus, **settings), estimator=estimator, **form)
    if not size:
        return BonusAudit(0.0, whole, None, "the bonus does nothing: the update is the same without it")
    bonus = slope(
        measure(policy, batch, Direction(added, with_bonus.step_size), **settings), estimator=estimator, **form
    )
    return BonusAudit(size / norm, whole, bonus, _verdict(size / norm, whole, bonus))


def _at(of: dict[str, torch.Tensor], name: str, both) -> torch.Tensor:
    """v of a parameter; 0 where only the other update moves it."""
    return of[name] if name in of else torch.zeros_like(next(v[name] for v in both if name in v))


def _verdict(relative_size: float, whole: Estimate, bonus: Estimate) -> str:
    if relative_size < ROUNDING:
        return (
            f"the bonus does nothing: without it the update differs by {relative_size:.0e} of itself, which is rounding"
        )
    ends = bonus.interval()
    if ends is None:
        return f"the bonus moves weights; what it does to entropy has no error bar: {bonus.stderr_reason}"
    if ends[0] <= 0 <= ends[1]:
        return "the bonus moves weights, but entropy by no amount that is told apart from 0"
    does = "raises" if bonus.value > 0 else "lowers"
    rest = whole.value - bonus.value
    return f"the bonus {does} entropy: a slope of {bonus.value:.2e} beside {rest:.2e} without it"
