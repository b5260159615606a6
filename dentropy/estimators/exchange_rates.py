"""The exchange rate: how much entropy a step gains or loses for each unit of reward that it gains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dentropy.estimators.estimate import Statistic
from dentropy.estimators.optional import load


@dataclass(frozen=True)
class ExchangeRate:
    """A ratio of two changes, in nats per token per unit of reward.

    value     change of entropy over change of reward; None with `reason`
    interval  the 95% interval by Fieller's theorem; None with `reason`
    reason    why there is none, in words; None where there is one
    """

    value: float | None
    interval: tuple[float, float] | None
    reason: str | None = None


def exchange_rate(entropy: Statistic, reward: Statistic, level: float = 0.95) -> ExchangeRate:
    """ρ = s_H / s_J of two changes (or slopes) of the same rollouts, with Fieller's interval.

    With the variances and the covariance of the two from their influence values, clustered by prompt, it is

        {ρ : (s_H − ρ s_J)² ≤ t² (V_HH − 2ρ V_HJ + ρ² V_JJ)} ,

    the ratios that are not told apart from the two: no ratio's distribution is assumed normal. Where the change of
    reward is not told apart from 0 (s_J² ≤ t² V_JJ), the set has no bounds, and nothing is given.

    Args:
        entropy, reward: what `slope`, `importance` or `forecast` gave, of the same rollouts and `prompts`.
        level: of the interval.

    Example:
        >>> import numpy as np, torch
        >>> from dentropy import forecast, sequence_sums, token_stats
        >>> from dataclasses import replace
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 8, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0, 3, 1]), dlogits)
        >>> base = replace(sequence_sums(stats, torch.tensor([0, 2, 4, 6, 8]), group=[0, 0, 1, 1]), tokens=stats)
        >>> found = forecast(base, {}, reward=[1.0, 0.0, 0.0, 1.0])
        >>> found.exchange_rate.reason
        'the change of reward is not told apart from 0'
    """
    groups = reward.groups
    if reward.stderr is None or entropy.stderr is None:
        return ExchangeRate(None, None, reward.stderr_reason or entropy.stderr_reason)
    t = float(load("scipy.special", "an interval").stdtrit(min(entropy.dof, reward.dof), (1 + level) / 2))

    def variance(influence: np.ndarray) -> float:
        return float(groups.variance_terms(influence).sum())

    scale = _spread(entropy.influence), _spread(reward.influence)
    a, b = entropy.influence / scale[0], reward.influence / scale[1]
    covariance = (variance(a + b) - variance(a - b)) / 4 * scale[0] * scale[1]
    square = reward.value**2 - t**2 * variance(reward.influence)
    middle = entropy.value * reward.value - t**2 * covariance
    constant = entropy.value**2 - t**2 * variance(entropy.influence)
    if square <= 0:
        return ExchangeRate(None, None, "the change of reward is not told apart from 0")
    root = max(middle**2 - square * constant, 0.0) ** 0.5
    return ExchangeRate(entropy.value / reward.value, ((middle - root) / square, (middle + root) / square))


def _spread(influence: np.ndarray) -> float:
    """Their largest size, so that neither of two drowns in the other's rounding; 1 where all are 0."""
    return float(np.abs(influence).max()) or 1.0
