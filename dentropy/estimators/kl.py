"""The KL divergence KL(π_0‖π_η) of the moved policy from the policy as it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import column
from dentropy.estimators.estimate import Statistic
from dentropy.estimators.mean_change import Rollouts, ratio_of_sums

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class PositiveMean(Statistic):
    """A mean of numbers that are not negative, whose distribution is skewed: its interval is on the log scale."""

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """value · exp(± t·stderr/value); None without a stderr, (0, 0) where every number is 0."""
        ends = super().interval(level)
        if ends is None or self.value == 0:
            return ends
        ratio = np.exp((ends[1] - self.value) / self.value)
        return float(self.value / ratio), float(self.value * ratio)

    def times(self, factor: float) -> PositiveMean:
        """The mean of the numbers times `factor` ≥ 0."""
        scaled = ("value", "stderr", "delta_stderr", "jackknife_stderr", "influence", "leave_one_out")
        found = {name: getattr(self, name) for name in scaled}
        return replace(self, **{name: None if value is None else value * factor for name, value in found.items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class Divergence:
    """KL(π_0‖π_η) in nats, per sequence or per token.

    fisher    Σ_k Var_p(ż_k), whose η²/2-fold it is to leading order; None for a table without that column
    measured  by η, from the log-ratios of the tokens
    """

    fisher: PositiveMean | None
    measured: dict[float, PositiveMean] = field(default_factory=dict)

    def forecast(self, eta: float) -> PositiveMean | None:
        """η²/2 · fisher."""
        return None if self.fisher is None else self.fisher.times(eta**2 / 2)


def kl_forecast(base: SequenceSums, rollouts: Rollouts, per: str) -> Divergence:
    """Forecast and measurement, per "sequence" or per "token".

    The rollouts are the policy's own, so that E[ρ_k] = 1 at every token and

        KL = E Σ_k −log ρ_k = E Σ_k (ρ_k − 1 − log ρ_k) ,

    of which every term is ≥ 0, so that it varies less. To leading order in η the terms' mean over the vocabulary is
    η²/2 Var_p(ż_k), half of η² times the Fisher information along the direction. Per token both are over Σ T_i.
    """
    n_tokens = column(base, "n_tokens", "base")
    size = n_tokens if per == "token" else np.ones_like(n_tokens)

    def of(terms: np.ndarray) -> PositiveMean:
        return ratio_of_sums(terms, size, rollouts, per=per, kind=PositiveMean)

    fisher = None if base.fisher is None else of(column(base, "fisher", "base"))
    measured = {eta: of(scores.divergence) for eta, scores in rollouts.at.items()}
    return Divergence(fisher=fisher, measured=measured)
