"""What a kind of the update's tokens adds to the slope, with an error bar, and the update without it.

The part of a step v that the tokens M make is a direction of its own,

    v_M = −γκP ∘ Σ_{j∈M} a_j ∇logp_j ,        ∇R·v_M = Σ_{j∈M} share_j ,

and one pass with tangents over the evaluation's rollouts along it gives that sum by the usual estimator, with the usual
standard error. What is left, v − v_M, needs no pass: slopes are linear in v, and so are their influence values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from dentropy.estimators import Estimate, difference, slope
from dentropy.model.direction import Direction
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.model.shards import beside
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.policy_gradient import PolicyGradientStep, clipped, loss_gradient
from dentropy.passes.policy_loss import Coefficients
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import SequenceSums


@dataclass(frozen=True, eq=False)
class UpdateGroup:
    """Some of the update's tokens, in nats per token (or sequence) per unit of η.

    Attributes:
        mask: which, bool [n_tokens].
        share: the slope along their part of the step: the sum of their shares, as `UpdateAttribution` has them.
        rest: that along the rest of the update: what the slope would be without them, of an Adam with its division by
            the second moment held as it is. `step_without` solves that anew.
    """

    mask: np.ndarray
    share: Estimate
    rest: Estimate

    @property
    def is_complement(self) -> bool:
        """Whether it took no pass, as what another group leaves of the step."""
        return self.share.name == "difference"


@in_turn
def update_groups(
    policy: Policy,
    batch: PackedBatch,
    update: PolicyGradientStep,
    sums: SequenceSums,
    groups: Mapping[str, np.ndarray],
    *,
    direction: Direction | None = None,
    estimator: str = "causal",
    per: str = "token",
    prompts: str = "random",
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> dict[str, UpdateGroup]:
    """The share of each group of the update's tokens in the slope on `batch`, and of all else, with standard errors.

    The errors are those of the evaluation: of this very update, for other rollouts of `batch`. Each group takes a
    reverse pass over those of the update's rollouts that hold its tokens and a pass with tangents over the batch, but
    one that is the complement of another, in a step of nothing but tokens (no momentum, decay, penalty or bonus), takes
    none.

    Args:
        policy, batch: those of the measurement.
        update: `policy_gradient_step(policy, rollouts, ...)`, of other rollouts than the batch's.
        sums: `measure(policy, batch, direction)` at eta = 0.
        groups: by name, masks of the update's tokens, bool [n_tokens]: any, or those of `token_groups`.
        direction: the one `sums` was measured along; None is the step's own.
        estimator, per, prompts: as in `slope`.
        token_budget, progress: as in `measure`; progress counts the tokens of every pass, spared ones too.

    Raises:
        ValueError: as `measure` and `slope` do; a step of another policy; a mask of another shape or dtype, or without
            a token that has a weight in the loss.

    Example:
        >>> from dentropy import PackedBatch, measure, policy_gradient_step, sample, slope, update_groups
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = sample(policy, [tokenizer.encode(text) for text in ("17=", "4=")], per_prompt=4, max_new_tokens=9)
        >>> prompt, *answers = (tokenizer.encode(text) for text in ("2=", "1+1", "1+2"))
        >>> rewarded = PackedBatch.from_lists([prompt] * 2, answers, group=[0, 0], reward=[1, 0])
        >>> step = policy_gradient_step(policy, rewarded, step_size=1e-4, optimizer="sgd")
        >>> sums = measure(policy, batch, step.direction())
        >>> found = update_groups(policy, batch, step, sums, {"first": np.tile([True, False, False], 2)})["first"]
        >>> abs(found.share.value + found.rest.value - slope(sums).value) < 1e-12
        True
    """
    if update.policy is not policy:
        raise ValueError("update: a step of another policy, expected one made with this Policy")
    masks = {name: _checked(name, mask, update) for name, mask in groups.items()}
    settings = {"token_budget": token_budget, "progress": progress}
    form = {"estimator": estimator, "per": per, "prompts": prompts}
    total, weighted = slope(sums, **form), update.coefficients.policy != 0
    all_tokens = _is_of_tokens_alone(update, direction)
    found: dict[str, UpdateGroup] = {}
    for name, mask in masks.items():
        others = (g for g in found.values() if np.array_equal(g.mask[weighted], ~mask[weighted]))
        complement = next(others, None) if all_tokens else None
        spared = update.batch.n_tokens + batch.n_tokens
        if complement is not None:
            found[name] = UpdateGroup(mask, share=complement.rest, rest=complement.share)
        else:
            share = slope(measure(policy, batch, group_direction(update, mask, **settings), **settings), **form)
            found[name] = UpdateGroup(mask, share, difference(total, share))
            spared -= tokens_of(update, mask) + batch.n_tokens
        if spared and progress is not None:
            progress(spared)
    return found


def group_direction(update: PolicyGradientStep, mask: np.ndarray, **settings) -> Direction:
    """v_M, the part of the step that the tokens `mask` make; settings are token_budget and progress.

    Only the rollouts that hold one of them run, those of `rollouts_with`.
    """
    rows, of = rollouts_with(update, mask), update.coefficients
    inside = np.repeat(np.isin(np.arange(len(update.batch)), rows), update.batch.response_lens)
    only = Coefficients(of.advantage[inside], np.where(mask, of.policy, 0.0)[inside])
    tensors = loss_gradient(update.policy, update.batch.take(rows), only, update.gradient, **settings)
    for name, g in tensors.items():
        tensors[name] = -update.clip_factor * update.parts(name).gain * g
    return Direction(tensors, update.step_size)


def tokens_of(update: PolicyGradientStep, mask: np.ndarray) -> int:
    """How many of the update's tokens run for the direction of a group."""
    return int(update.batch.response_lens[rollouts_with(update, mask)].sum())


def rollouts_with(update: PolicyGradientStep, mask: np.ndarray) -> np.ndarray:
    """The rollouts of the update with a token of `mask` that has a weight in the loss, ascending."""
    row = np.repeat(np.arange(len(update.batch)), update.batch.response_lens)
    return np.unique(row[mask & (update.coefficients.policy != 0)])


@in_turn
def step_without(update: PolicyGradientStep, mask: np.ndarray, **settings) -> PolicyGradientStep:
    """The step with the tokens `mask` really left out of its loss: its gradient, clipping and optimizer solved anew.

    The average is still over all tokens; a KL penalty and an entropy bonus keep theirs. settings are token_budget and
    progress.

    Raises:
        ValueError: as `update_groups` for a mask; where nothing is left.
    """
    of = update.coefficients
    left = replace(of, policy=np.where(_checked("mask", mask, update), 0.0, of.policy))
    if not left.logp.any() and left.entropy is None:
        raise ValueError("mask: every token with a weight in the loss, expected some to be left")
    gradients = loss_gradient(update.policy, update.batch, left, update.gradient, **settings)
    gradients, clip_factor = clipped(gradients, update.max_grad_norm)
    return replace(update, coefficients=left, gradient=gradients, clip_factor=clip_factor)


def _checked(name: str, mask, update: PolicyGradientStep) -> np.ndarray:
    mask, n_tokens = np.asarray(mask), update.batch.n_tokens
    if mask.shape != (n_tokens,) or mask.dtype != bool:
        raise ValueError(f"{name}: {mask.dtype} of shape {mask.shape}, expected bool of shape ({n_tokens},)")
    if not update.coefficients.policy[mask].any():
        raise ValueError(f"{name}: no token with a weight in the loss, expected one or more")
    return mask


def _is_of_tokens_alone(update: PolicyGradientStep, direction: Direction | None) -> bool:
    """Whether the update is −γκP ∘ Σ_j a_j ∇logp_j over its tokens, to the bit, and nothing else."""
    if update.coefficients.kl is not None or update.coefficients.entropy is not None:
        return False
    v = (update.direction() if direction is None else direction).tensors
    of_tokens = {name: -(update.parts(name).gain * g) for name, g in update.gradient.items()}
    return v.keys() == of_tokens.keys() and all(
        torch.equal(beside(v[name], x).to(x.dtype), x) for name, x in of_tokens.items()
    )
