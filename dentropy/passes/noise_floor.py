"""The arithmetic's own error of a measured ΔH: below it a measurement says nothing, however small its error bar.

ΔH(η) is the difference of two sums of rounded numbers, at weights that are themselves rounded to θ + η·v. Sampling
error bars do not see that: both sides use the same rollouts.
"""

import math
from collections.abc import Callable

import torch

from dentropy.estimators import Estimate, importance, slope
from dentropy.model.direction import Direction
from dentropy.model.policy import Policy
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO, TokenBudget
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import SequenceSums

# Steps in units of the last place of a typical weight: enough for most weights to move and to round on their own,
# too little for anything but the linear term of ΔH.
STEPS = (30.0, 60.0)
PASSES = 2 * len(STEPS)


def noise_floor(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    base: SequenceSums,
    *,
    exact: Estimate | None = None,
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Two standard deviations of the rounding in a measured ΔH, in nats per token.

    Measures ΔH at ±ε for two small ε that follow from the sizes of θ and v alone, + and − under different packing. The
    half difference is ε·R' with R' the "exact" slope of `base`; what is left is rounding, of half the variance of one
    measurement. Never below the rounding of the sums themselves, ε_dtype · H̄ / sqrt(tokens).

    Args:
        policy, batch, direction: those of the measurement.
        base: `measure(policy, batch, direction)`, at eta = 0.
        exact: the "exact" slope of `base`, where it is there already.
        token_budget, progress: as in `measure`.

    Example:
        >>> from dentropy import sample
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = sample(policy, [tokenizer.encode("17=")], per_prompt=4, max_new_tokens=33)
        >>> direction = Direction({"model.norm.weight": policy.model.model.norm.weight})
        >>> 0 < noise_floor(policy, batch, direction, measure(policy, batch, direction)) < 1e-3
        True
    """
    moving = policy.moving(direction)
    weights = math.sqrt(sum(float(p.detach().double().square().sum()) for p, _ in moving))
    tangent = math.sqrt(sum(float(v.double().square().sum()) for _, v in moving))
    unit = torch.finfo(policy.dtype).eps * (weights / tangent if weights else 1.0)
    if exact is None:
        exact = slope(base, estimator="exact")
    # Half of what one microbatch would hold: another packing, also where the whole batch fits into one.
    held = min(TokenBudget(token_budget, policy.device).tokens, int(batch.offsets[-1]))
    packings = ((1, token_budget), (-1, max(1, held // 2)))

    def rounding(epsilon: float) -> float:
        plus, minus = (
            importance(
                base,
                measure(policy, batch, direction, eta=sign * epsilon, order=0, token_budget=budget, progress=progress),
            ).delta
            for sign, budget in packings
        )
        return (plus - minus) / 2 - epsilon * exact.value

    mean_square = sum(rounding(step * unit) ** 2 for step in STEPS) / len(STEPS)
    n_tokens = float(base.n_tokens.sum())
    of_the_sums = torch.finfo(policy.dtype).eps * float(base.entropy.sum()) / n_tokens / math.sqrt(n_tokens)
    return 2 * max(math.sqrt(2 * mean_square), of_the_sums)
