"""Checked access to the columns of a table of per-rollout sums, and the ratio that every estimator starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.reweighting import sequence_weights, weighted

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

PER = ("token", "sequence")

# An answer that is drawn once in 1/ε rollouts adds ε(1 + log 1/ε) nats to each: 50 nats are about nine draws of one in
# a hundred. With fewer, an error bar is made by which of them happened to be drawn. (On a policy of 0.3 nats per
# rollout, 95% intervals for fixed prompts cover 71% at 11 nats, 81% at 21 and 90% at 43.)
LEAST_ENTROPY = 50.0

# An effective sample size below which an estimate rests on a few heavy weights.
LEAST_ESS = 10.0

_SECOND_ORDER = ("d2logp", "d2entropy")
_SECOND_ORDER_TO_GO = ("dentropy_to_go", "entropy_to_go_2", "length_to_go_2")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument}: {value!r}, expected one of {', '.join(map(repr, choices))}")


def column(sums: SequenceSums, name: str, argument: str = "sums") -> np.ndarray:
    """The column `name` as float64 [S]; ValueError where it is missing or a value is not finite."""
    values = getattr(sums, name)
    if values is None:
        expected = "order=2 or d2logits" if name in _SECOND_ORDER + _SECOND_ORDER_TO_GO else "a direction or dlogits"
        if name in _SECOND_ORDER_TO_GO and sums.d2logp is not None:
            expected += " by a version that has it"
        raise ValueError(f"{argument}.{name}: None, expected the column of a table made with {expected}")
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(
            f"{argument}.{name}: {values[row]} for rollout {int(sums.rollout[row])} "
            f"({np.sum(~finite)} of {values.size} rollouts are not finite), expected finite values"
        )
    return values


@dataclass(frozen=True, eq=False)
class EntropyRatio:
    """R = Σ H_i / Σ T_i at the weights of a table. float64; per="sequence" has 1 for T_i.

    Of rollouts of another sampler every H_i and T_i has its base weight, see `reweighting`; per="sequence" W_i, or with
    prefix weights 1, for T_i.

    entropy  [S], H_i
    size     [S], T_i
    total    D = Σ T_i
    mean     H̄ = Σ H_i / D
    centred  [S], H_i − H̄ T_i; over D these are the influence values of H̄
    table    the table whose columns these are: what is averaged has its base weight there
    nats     Σ H_i of the rollouts as they are
    ess      effective sample size of the base weights, of prefix weights their means; None without a sampler
    """

    entropy: np.ndarray
    size: np.ndarray
    total: float
    mean: float
    centred: np.ndarray
    table: SequenceSums
    nats: float
    ess: float | None

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why no error bar from this table is to be trusted, in words."""
        found = []
        if self.ess is not None and self.ess < LEAST_ESS:
            found.append(
                f"the base weights of the rollouts, of another sampler, have an ESS of {self.ess:.1f} of "
                f"{self.size.size}, below {LEAST_ESS:g}"
            )
        if self.nats < LEAST_ENTROPY:
            found.append(self._few_nats())
        return tuple(found)

    def _few_nats(self) -> str:
        return (
            f"the rollouts hold {self.nats:.2g} nats of entropy in all, below {LEAST_ENTROPY:g}: of a policy so sure, "
            "or of so few rollouts, the rare answers that make an estimate and its error may be missing"
        )

    def influence(self, terms: np.ndarray, dmean: np.ndarray) -> np.ndarray:
        """ψ [S] of the estimate Σ x_i / D, x_i being `terms` [S] that hold −H̄ times `dmean` [S]."""
        value = terms.sum() / self.total
        return (terms - value * self.size - dmean.sum() / self.total * self.centred) / self.total


def entropy_ratio(sums: SequenceSums, per: str, weights: str, argument: str = "sums") -> EntropyRatio:
    """The entropy per token or sequence of a table, with base weights of that form where another sampler drew it.

    Raises:
        ValueError: another `per`; no rollout or no token at all; what `weighted` refuses; weights that vanish.
    """
    check_choice("per", per, PER)
    n_tokens = column(sums, "n_tokens", argument)
    if n_tokens.size == 0:
        raise ValueError(f"{argument}: no rows, expected at least one rollout")
    if n_tokens.sum() == 0:
        raise ValueError(f"{argument}.n_tokens: 0 for all {n_tokens.size} rollouts, expected tokens in one")
    nats, table = column(sums, "entropy", argument).sum(), weighted(sums, weights)
    entropy = column(table, "entropy", argument)
    if per == "token":
        size = column(table, "n_tokens", argument)
    else:
        size = sequence_weights(sums) if weights == "sequence" else np.ones_like(n_tokens)
    total = size.sum()
    if total == 0:
        raise ValueError(
            f"{argument}.sampler_logp: so far above {argument}.logp that the base weights of all rollouts with tokens "
            "vanish, expected a sampler close enough to the policy to be reweighted"
        )
    mean = entropy.sum() / total
    ess = None
    if sums.sampler_logp is not None:
        weight = column(table, "n_tokens", argument) / np.maximum(n_tokens, 1)
        ess = float(weight.sum() ** 2 / np.sum(weight**2))
    return EntropyRatio(entropy, size, total, mean, entropy - mean * size, table, nats, ess)
