"""The arithmetic's own error of a measured ΔH: below it a measurement says nothing, however small its error bar.

ΔH(η) is the difference of two sums of rounded numbers, at weights that are themselves rounded to θ + η·v. Sampling
error bars do not see that: both sides use the same rollouts.
"""

import math
from collections.abc import Callable

from dentropy.batch import PackedBatch
from dentropy.direction import Direction
from dentropy.estimators import importance, slope
from dentropy.measure import measure
from dentropy.policy import Policy
from dentropy.tables import SequenceSums

# Of the smallest η: near enough for odd terms beyond the linear one to vanish, far enough for weights to move.
FRACTION = 0.01


def noise_floor(policy: Policy, batch: PackedBatch, direction: Direction, base: SequenceSums, eta: float, *,
                token_budget: int = 4096, progress: Callable[[int], None] | None = None) -> float:
    """Two standard deviations of the rounding in a measured ΔH, in nats per token, from a single draw of it.

    Measures ΔH at ±ε, ε = eta/100, the two under different packing. Their half difference is ε·R' with R' the "exact"
    slope of `base`, up to terms of order ε³; what is left is rounding, half of the sum of two roundings.

    Raises ValueError for eta = 0.

    >>> noise_floor(policy, batch, direction, base, eta=1e-6)      # doctest: +SKIP
    3.1e-08
    """
    if eta == 0:
        raise ValueError("eta: 0, expected the smallest η that is measured")
    epsilon = FRACTION * abs(eta)
    plus = measure(policy, batch, direction, eta=epsilon, order=0, token_budget=token_budget, progress=progress)
    minus = measure(policy, batch, direction, eta=-epsilon, order=0, token_budget=max(1, token_budget // 2),
                    progress=progress)
    half_difference = (importance(base, plus).delta - importance(base, minus).delta) / 2
    rounding = half_difference - epsilon * slope(base, estimator="exact").value
    return 2 * math.sqrt(2) * abs(rounding)
