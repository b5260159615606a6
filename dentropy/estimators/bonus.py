"""How large an entropy bonus makes an update change entropy by a given amount."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dentropy.estimators.estimate import Estimate, check_estimate, check_same_rollouts
from dentropy.estimators.fieller import fieller


@dataclass(frozen=True)
class BonusCoefficient:
    """λ*, in units of the bonus's own gradient.

    value     the coefficient; it may be negative
    interval  the 95% interval by Fieller's theorem; None with `reason`
    reason    why there is none, in words; None where there is one
    """

    value: float
    interval: tuple[float, float] | None
    reason: str | None = None


def bonus_coefficient(
    target: float, update: Estimate, bonus: Estimate, *, eta: float = 1.0, level: float = 0.95
) -> BonusCoefficient:
    """λ* = (τ − s_update) / s_bonus, with which v_update + λ v_bonus is predicted to change entropy by `target`.

    Args:
        target: ΔH in nats per token (or sequence), τ times η: 0 holds entropy where it is.
        update, bonus: the slopes along v_update and v_bonus, of rollouts that made neither: a bonus judged on the
            rollouts that made it looks larger than it is.
        eta: η, the length of the step: its learning rate where v is that of an optimizer.
        level: of the interval.

    Raises:
        ValueError: a target or η that is not finite, an η of 0; no slopes, or slopes of different rollouts; a bonus
            whose slope is 0.

    Example:
        >>> import torch
        >>> from dentropy import sequence_sums, slope, token_stats
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, a, b = torch.randn(3, 6, 5, generator=seeded, dtype=torch.float64)
        >>> targets, ends = torch.tensor([1, 4, 0, 2, 2, 0]), torch.tensor([0, 3, 4, 6])
        >>> update, bonus, both = (
        ...     slope(sequence_sums(token_stats(logits, targets, v), ends)) for v in (a, b, a + 0.5 * b)
        ... )
        >>> round(bonus_coefficient(0.1 * both.value, update, bonus, eta=0.1).value, 9)
        0.5
    """
    for name, value in (("target", target), ("eta", eta)):
        if not math.isfinite(value) or (name == "eta" and not value):
            raise ValueError(f"{name}: {value!r}, expected a finite number{' other than 0' if name == 'eta' else ''}")
    check_estimate("update", update, "slope")
    check_estimate("bonus", bonus, "slope", update.estimator)
    check_same_rollouts("bonus", bonus, update.groups, update.per)
    if not bonus.value:
        raise ValueError("bonus: a slope of 0, expected a bonus that moves entropy")
    missing = replace(update, value=target / eta - update.value, influence=-update.influence)
    value = missing.value / bonus.value
    if update.stderr is None:
        return BonusCoefficient(value, None, update.stderr_reason)
    interval = fieller(missing, bonus, level)
    return BonusCoefficient(value, interval, None if interval else "the bonus's slope is not told apart from 0")
