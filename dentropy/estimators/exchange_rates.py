"""The exchange rate: how much entropy a step gains or loses for each unit of reward that it gains."""

from __future__ import annotations

from dataclasses import dataclass

from dentropy.estimators.estimate import Statistic
from dentropy.estimators.fieller import fieller


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
    if reward.stderr is None or entropy.stderr is None:
        return ExchangeRate(None, None, reward.stderr_reason or entropy.stderr_reason)
    interval = fieller(entropy, reward, level)
    if interval is None:
        return ExchangeRate(None, None, "the change of reward is not told apart from 0")
    return ExchangeRate(entropy.value / reward.value, interval)
