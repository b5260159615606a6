"""The forecast: what one step does to entropy, reward, length and pass@k, and how far it moves the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import entropy_ratio
from dentropy.estimators.exchange_rates import ExchangeRate, exchange_rate
from dentropy.estimators.importance_sampling import importance
from dentropy.estimators.kl import Divergence, kl_forecast
from dentropy.estimators.length_forecast import length_forecast
from dentropy.estimators.mean_change import MeanChange, Rollouts
from dentropy.estimators.pass_at_k import check_pass_at_k, pass_at_k_forecast
from dentropy.estimators.reward_forecast import checked_values, value_forecast
from dentropy.estimators.slopes import slope
from dentropy.shown import lines, number

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from dentropy.stats.tables import SequenceSums


@dataclass(frozen=True, eq=False, kw_only=True)
class Forecast:
    """What a step buys and what it costs. Slopes are per unit of η, changes by η.

    entropy         in nats per token
    length          mean number of generated tokens, per rollout
    kl, kl_per_token   KL(π_0‖π_η) in nats per rollout, and per token
    reward          mean reward; None without rewards
    pass_at_k       by k; empty where none was asked for
    values          by name: the means of the other numbers given
    exchange_rate   entropy per reward of the slopes, as η → 0; None without rewards
    exchange_rates  the same by η, of the changes
    """

    entropy: MeanChange
    length: MeanChange
    kl: Divergence
    kl_per_token: Divergence
    reward: MeanChange | None = None
    pass_at_k: dict[int, MeanChange] = field(default_factory=dict)
    values: dict[str, MeanChange] = field(default_factory=dict)
    exchange_rate: ExchangeRate | None = None
    exchange_rates: dict[float, ExchangeRate] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The slopes; the changes are counted."""
        means = {"entropy": (self.entropy, "nats per token"), "length": (self.length, "tokens")}
        means |= {} if self.reward is None else {"reward": (self.reward, "")}
        means |= {f"pass@{k}": (found, "") for k, found in self.pass_at_k.items()}
        means |= {name: (found, "") for name, found in self.values.items()}
        rows = [(name, _slope_text(found, unit)) for name, (found, unit) in means.items()]
        if self.kl.fisher is not None:
            text = number(self.kl.fisher.value, self.kl.fisher.stderr, "nats per rollout per unit of η²/2")
            rows.append(("KL", text))
        return lines(self, [*rows, ("changes", f"at {len(self.entropy.changes)} η")])


def forecast(
    base: SequenceSums,
    moved: Mapping[float, SequenceSums],
    reward: ArrayLike | None = None,
    values: Mapping[str, ArrayLike] | None = None,
    *,
    pass_at_k: Sequence[int] = (),
    entropy: MeanChange | None = None,
    prompts: str = "random",
) -> Forecast:
    """What a step along the direction does: slopes, and changes at each η that was measured, with their errors.

    Everything comes from the tables of `measure`; no model is run. A mean over rollouts of a number that the weights
    do not enter changes because other rollouts become likely: its slope is E[(r − b) ℓ'], with a baseline b from the
    other rollouts of the prompt, and at η (r − b)(w − 1) takes the place. mathematics.md has the forms for length,
    pass@k and the KL divergence.

    Args:
        base: table at the base weights, of a pass with a direction and keep_tokens=True.
        moved: by η, tables of the same rollouts at θ + η·v, with keep_tokens=True; may be empty.
        reward: [S] finite numbers in the row order of `base`, or None.
        values: by name, other numbers of each rollout, [S].
        pass_at_k: the k to look at; needs rewards of 0 and 1 and k rollouts or more for every prompt.
        entropy: slope and changes of the entropy where they are there already, with the same η and `prompts`; None:
            `slope` and `importance` are asked.
        prompts: "random" or "fixed", see `clustered_stderr`.

    Returns:
        Forecast; float64.

    Raises:
        ValueError: tables without tokens or derivatives, that do not pair, or with a value that is not finite; an η
            that is not finite; numbers that are not one finite number per rollout; for pass@k, rewards that are missing
            or not 0 or 1, and a prompt with fewer rollouts than k; an unknown `prompts`; an `entropy` of other η or
            `prompts`.

    Example:
        >>> import torch
        >>> from dataclasses import replace
        >>> from dentropy import forecast, sequence_sums, token_stats
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 8, 5, generator=seeded, dtype=torch.float64)
        >>> targets, ends, group = torch.tensor([1, 4, 0, 2, 2, 0, 3, 1]), torch.tensor([0, 3, 4, 6, 8]), [0, 0, 1, 1]
        >>> def table(*inputs):
        ...     stats = token_stats(*inputs)
        ...     return replace(sequence_sums(stats, ends, group=group), tokens=stats)
        >>> base, moved = table(logits, targets, dlogits), table(logits + 1e-3 * dlogits, targets)
        >>> found = forecast(base, {1e-3: moved}, reward=[1.0, 0.0, 1.0, 0.0], pass_at_k=[1, 2])
        >>> abs(found.reward.changes[1e-3].value / (1e-3 * found.reward.slope.value) - 1) < 0.01
        True
        >>> found.length.base
        2.0
    """
    moved = {_eta(eta): table for eta, table in moved.items()}
    rollouts = Rollouts.of(base, moved, prompts)
    n = len(base)
    rewards = None if reward is None else checked_values("reward", reward, n)
    numbers = {name: checked_values(f"values[{name!r}]", array, n) for name, array in (values or {}).items()}
    check_pass_at_k(pass_at_k, rewards, rollouts.groups(), base.sampler_logp)
    entropy = _entropy(base, moved, prompts) if entropy is None else _checked_entropy(entropy, moved, prompts)
    found = None if rewards is None else value_forecast(rewards, rollouts)
    return Forecast(
        entropy=entropy,
        length=length_forecast(rollouts),
        kl=kl_forecast(base, rollouts, "sequence"),
        kl_per_token=kl_forecast(base, rollouts, "token"),
        reward=found,
        pass_at_k={int(k): pass_at_k_forecast(rewards, int(k), rollouts) for k in pass_at_k},
        values={name: value_forecast(array, rollouts) for name, array in numbers.items()},
        exchange_rate=None if found is None else exchange_rate(entropy.slope, found.slope),
        exchange_rates={} if found is None else {eta: _rate_at(eta, entropy, found) for eta in moved},
    )


def _slope_text(found: MeanChange, unit: str) -> str:
    slope_text = number(found.slope.value, found.slope.stderr, f"{unit} per unit of η".lstrip())
    return f"{found.base:.3e}, slope {slope_text}"


def _rate_at(eta: float, entropy: MeanChange, reward: MeanChange) -> ExchangeRate:
    return exchange_rate(entropy.changes[eta], reward.changes[eta])


def _entropy(base: SequenceSums, moved: dict[float, SequenceSums], prompts: str) -> MeanChange:
    changes = {eta: importance(base, table, weights="prefix", prompts=prompts) for eta, table in moved.items()}
    ratio = entropy_ratio(base, "token", "prefix", "base")
    return MeanChange(base=float(ratio.mean), slope=slope(base, prompts=prompts), changes=changes)


def _checked_entropy(entropy: MeanChange, moved: dict[float, SequenceSums], prompts: str) -> MeanChange:
    if set(entropy.changes) != set(moved):
        raise ValueError(f"entropy: changes at η = {sorted(entropy.changes)}, expected those of moved, {sorted(moved)}")
    for found in (entropy.slope, *entropy.changes.values()):
        if found.prompts != prompts:
            raise ValueError(f"entropy: prompts={found.prompts!r}, expected {prompts!r}")
    return entropy


def _eta(eta: float) -> float:
    if not isinstance(eta, float | int | np.number) or not math.isfinite(eta):
        raise ValueError(f"moved: a table at η = {eta!r}, expected a finite number")
    return float(eta)
