"""An update judged on the rollouts that make it, without the bias: each fold of the prompts by the other folds' update.

On its own rollouts an update looks better than it is, by the covariance of the noise in ∇R and in v. Fold k of the
prompts is measured along the step v_k that the other folds make, and all folds are one table with one estimate: what it
is of is a step made from (K − 1)/K of the rollouts.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import numpy as np
from torch import Tensor

from dentropy.model.direction import Direction
from dentropy.model.in_place import in_turn
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.policy_gradient import PolicyGradientStep, clipped, loss_gradient
from dentropy.passes.policy_loss import Coefficients, PolicyLoss, token_weights
from dentropy.passes.slope_gradient import prompt_parts
from dentropy.stats.tables import SequenceSums

FOLDS = 8


@in_turn
def cross_fitted(
    update: PolicyGradientStep,
    *,
    mask: np.ndarray | None = None,
    folds: int = FOLDS,
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> SequenceSums:
    """A table of the update's own rollouts, each prompt measured along a step that it is not in: for `slope`.

    Each fold's step is solved on its own, clipping and an Adam's second moment too. It takes one reverse pass and one
    with tangents in all, with `mask` a reverse pass more, and a gradient of each fold in memory.

    Args:
        update: `policy_gradient_step(policy, rollouts, ...)`.
        mask: of its tokens, bool [n_tokens]: along the part of each step that these make (see `update_groups`).
        folds: how many; of fewer prompts, one each.
        token_budget, progress: as in `measure`.

    Returns:
        SequenceSums with tangent columns, in the batch's order.

    Raises:
        ValueError: for rollouts of one prompt; fewer than two folds; as `measure` does; where the other folds have no
            gradient.

    Example:
        >>> from dentropy import cross_fitted, policy_gradient_step, slope
        >>> from dentropy.demo.run import load_policy, draw_rollouts
        >>> policy, tokenizer = load_policy()
        >>> rollouts = draw_rollouts(policy, tokenizer, n_prompts=8, per_prompt=4, seed=0)
        >>> step = policy_gradient_step(policy, rollouts, step_size=1e-4)
        >>> len(slope(cross_fitted(step, folds=4)).contributions)
        32
    """
    batch, settings = update.batch, {"token_budget": token_budget, "progress": progress}
    parts = [rows for rows, _ in prompt_parts(batch, folds)] if folds > 1 else []
    if len(parts) < 2:
        raise ValueError(f"folds: {folds} of {batch.n_groups} prompts, expected two or more of both")
    empty = np.setdiff1d(np.arange(len(batch)), np.concatenate(parts))  # of prompts without a generated token
    parts[0] = np.union1d(parts[0], empty)
    of = update.coefficients
    whole = _of_folds(update, of, parts, **settings)
    some = None
    if mask is not None:
        only = replace(of, policy=np.where(mask, of.policy, 0.0), kl=None, entropy=None)
        some = _of_folds(update, only, parts, **settings)
    tables = []
    for k, rows in enumerate(parts):
        others = np.sort(np.concatenate(parts[:k] + parts[k + 1 :]))
        scale = _rescaled(update.loss, batch, others)
        gradients, clip_factor = clipped(_sum_of_others(whole, k, scale), update.max_grad_norm)
        step = replace(update, gradient=gradients, clip_factor=clip_factor)
        direction = step.direction() if some is None else _part(step, _sum_of_others(some, k, scale))
        table = measure(update.policy, batch.take(rows), direction, **settings)
        tables.append(replace(table, rollout=rows[table.rollout]))
    found = SequenceSums.concatenate(tables)
    return found.take(np.argsort(found.rollout))


def _of_folds(update: PolicyGradientStep, of: Coefficients, parts: list[np.ndarray], **settings) -> list[dict]:
    """The gradient of each fold, by parameter name."""
    row = np.repeat(np.arange(len(update.batch)), update.batch.response_lens)
    found = []
    for rows in parts:
        inside = np.isin(row, rows)
        own = Coefficients(*(None if x is None else x[inside] for x in (of.advantage, of.policy, of.kl, of.entropy)))
        found.append(loss_gradient(update.policy, update.batch.take(rows), own, update.gradient, **settings))
    return found


def _sum_of_others(parts: list[dict[str, Tensor]], k: int, scale: float) -> dict[str, Tensor]:
    others = parts[:k] + parts[k + 1 :]
    return {name: scale * reduce(lambda x, y: x + y, (part[name] for part in others)) for name in parts[0]}


def _rescaled(loss: PolicyLoss, batch, others: np.ndarray) -> float:
    """n_j of the others alone over n_j among all: an average over fewer."""
    inside = np.isin(np.repeat(np.arange(len(batch)), batch.response_lens), others)
    return float(token_weights(loss, batch.take(others))[0] / token_weights(loss, batch)[inside][0])


def _part(step: PolicyGradientStep, gradients: dict[str, Tensor]) -> Direction:
    """−γκP ∘ the gradient of some tokens."""
    tensors = {name: -step.clip_factor * step.parts(name).gain * g for name, g in gradients.items()}
    return Direction(tensors, step.step_size)
