"""The prediction ΔH(η) ≈ η R' (+ η² R''/2), its error against the measurement, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.curvatures import curvature
from dentropy.estimators.estimate import Estimate, Statistic, with_errors
from dentropy.estimators.importance_sampling import importance
from dentropy.estimators.slopes import slope
from dentropy.estimators.uncertainty import Groups

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

# Where the quadratic prediction differs from the linear one by this fraction of it.
LINEAR_TOLERANCE = 0.1


def predict(
    sums: SequenceSums,
    eta: float,
    *,
    order: int = 1,
    estimator: str = "causal",
    per: str = "token",
    prompts: str = "random",
) -> Estimate:
    """The change of entropy predicted from the base weights alone: η R', with order=2 also η² R''/2.

    Args:
        sums: a table with tangent columns, [S] float64; order=2 needs the second-order ones too.
        eta: η, in units of the direction.
        order: 1 or 2.
        estimator, per, prompts: as for `slope`; R'' is that of `curvature`.

    Returns:
        Estimate of ΔH(η) in nats per token (or per sequence), named "prediction". Its parts linear and, with
        order=2, quadratic add up to value.

    Raises:
        ValueError: an `eta` that is not finite, an order that is neither 1 nor 2, or what `slope` and
            `curvature` refuse.

    Example:
        >>> import torch
        >>> from dentropy import sequence_sums, slope, token_stats
        >>> from dentropy.estimators import predict
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits)
        >>> sums = sequence_sums(stats, torch.tensor([0, 3, 4, 6]))
        >>> predict(sums, 0.5).value == 0.5 * slope(sums).value
        True
    """
    _check_eta(eta)
    if order not in (1, 2):
        raise ValueError(f"order is {order!r}, expected 1 or 2")
    first = slope(sums, estimator=estimator, per=per, prompts=prompts)
    terms = {"linear": (eta, first)}
    if order == 2:
        terms["quadratic"] = (eta**2 / 2, curvature(sums, per=per, prompts=prompts))
    return _combine(terms, name="prediction", estimator=estimator)


def prediction_error(
    base: SequenceSums,
    moved: SequenceSums,
    eta: float,
    *,
    order: int = 1,
    estimator: str = "causal",
    per: str = "token",
    prompts: str = "random",
) -> Estimate:
    """Prediction less measurement of ΔH(η), on the same rollouts.

    The two are far from independent: the standard error comes from the difference of their influence values,
    rollout by rollout. With estimator="exact" chance does nearly the same to both and what is left is what
    the Taylor expansion leaves out on these very rollouts; "causal" adds the difference of the two slopes,
    whose expectation is 0.

    Args:
        base: a table with tangent columns at the base weights, as for `predict`.
        moved: the same rollouts scored at θ + η·v, as for `importance`.
        eta, order, estimator, per, prompts: as for `predict`.

    Returns:
        Estimate in nats per token (or per sequence), named "prediction error". Its parts prediction and
        measurement (which is −ΔH) add up to value.

    Raises:
        ValueError: what `predict` and `importance` refuse.

    Example:
        >>> import torch
        >>> from dentropy import importance, sequence_sums, token_stats
        >>> from dentropy.estimators import predict, prediction_error
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
        >>> targets, ends = torch.tensor([1, 4, 0, 2, 2, 0]), torch.tensor([0, 3, 4, 6])
        >>> base = sequence_sums(token_stats(logits, targets, dlogits), ends)
        >>> moved = sequence_sums(token_stats(logits + 0.1 * dlogits, targets), ends)
        >>> error = prediction_error(base, moved, 0.1)
        >>> abs(error.value - (predict(base, 0.1).value - importance(base, moved).delta)) < 1e-12
        True
    """
    predicted = predict(base, eta, order=order, estimator=estimator, per=per, prompts=prompts)
    measured = importance(base, moved, per=per, prompts=prompts)
    terms = {"prediction": (1.0, predicted), "measurement": (-1.0, measured)}
    return _combine(terms, name="prediction error", estimator=estimator)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrustRange(Statistic):
    """How far along the direction a prediction can be trusted. The fields of `Statistic` for η*, and:

    eta_star      η* = 2 |R' / R''|, where the linear and the quadratic term are equal; inf where R'' is 0
    linear_limit  0.1 η*: up to here the linear and the quadratic prediction are within 10% of each other
    """

    @property
    def eta_star(self) -> float:
        return self.value

    @property
    def linear_limit(self) -> float:
        return LINEAR_TOLERANCE * self.value


def trust_range(first: Estimate, second: Estimate) -> TrustRange:
    """η* = 2 |R' / R''| from a slope and a curvature of one table.

    At η the quadratic term is |η| / η* of the linear one, so up to 0.1 η* the two predictions are within 10%
    of each other. The length of the direction scales out: η*·‖v‖ depends on where v points alone. A slope or
    curvature within 2 standard errors of 0 is named in `warnings`: η* then says little.

    Args:
        first, second: what `slope` and `curvature` gave for one table with the same `per` and `prompts`.

    Returns:
        TrustRange, in units of η. Where R'' is 0, η* is inf and has no standard error.

    Raises:
        ValueError: estimates of other kinds, or of different rollouts, `per` or `prompts`.

    Example:
        >>> import torch
        >>> from dentropy import curvature, sequence_sums, slope, token_stats
        >>> from dentropy.estimators import trust_range
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits, d2logits = torch.randn(3, 6, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits, d2logits)
        >>> sums = sequence_sums(stats, torch.tensor([0, 3, 4, 6]))
        >>> reach = trust_range(slope(sums), curvature(sums))
        >>> reach.eta_star == 2 * abs(slope(sums).value / curvature(sums).value)
        True
    """
    for argument, estimate, name in (("first", first, "slope"), ("second", second, "curvature")):
        if estimate.name != name:
            raise ValueError(f"{argument} is a {estimate.name}, expected a {name}")
    _check_same_rollouts(first, second)
    groups, value = Groups.of(first.group), math.inf
    influence, jackknife = np.zeros_like(first.influence), (None, "η* is infinite")
    if second.value != 0:
        value = 2 * abs(first.value / second.value)
        sign = math.copysign(1.0, first.value) * math.copysign(1.0, second.value)
        relative = first.influence - first.value / second.value * second.influence
        influence = 2 * sign * relative / second.value
        jackknife = _ratio_left_out(first, second)
    fields = with_errors(value, influence, jackknife, groups=groups, prompts=first.prompts, per=first.per)
    if second.value == 0:
        fields |= {"stderr": None, "delta_stderr": None, "dof": None, "stderr_reason": "the curvature is 0"}
        fields["warnings"] = ()
    return TrustRange(**fields | {"warnings": _unresolved(first, second) + fields["warnings"]})


def _ratio_left_out(first: Estimate, second: Estimate) -> tuple[np.ndarray | None, str | None]:
    """η* without each group, as `leave_one_out` returns it."""
    for estimate in (first, second):
        if estimate.leave_one_out is None:
            return None, estimate.jackknife_reason
    if not second.leave_one_out.all():
        return None, "the curvature without one of the groups is 0"
    return 2 * np.abs(first.leave_one_out / second.leave_one_out), None


def _unresolved(first: Estimate, second: Estimate) -> tuple[str, ...]:
    """A warning for each of slope and curvature that is within 2 standard errors of 0."""
    consequence = {"slope": "η* may be far smaller", "curvature": "η* may be far larger"}
    return tuple(
        f"the {e.name} {e.value:.3g} ± {e.stderr:.2g} is not told apart from 0: {consequence[e.name]}"
        for e in (first, second)
        if e.stderr is not None and abs(e.value) < 2 * e.stderr
    )


def _combine(terms: dict[str, tuple[float, Statistic]], *, name: str, estimator: str) -> Estimate:
    """The sum of factor · statistic, all of the same rollouts; the terms become its parts."""
    factors, statistics = zip(*terms.values(), strict=True)

    def total(field: str):
        return sum(factor * getattr(s, field) for factor, s in zip(factors, statistics, strict=True))

    refused = [s.jackknife_reason for s in statistics if s.leave_one_out is None]
    jackknife = (None, refused[0]) if refused else (total("leave_one_out"), None)
    groups, one = Groups.of(statistics[0].group), statistics[0]
    return Estimate(
        **with_errors(total("value"), total("influence"), jackknife, groups=groups, prompts=one.prompts, per=one.per),
        contributions=total("contributions"),
        parts={part: float(factor * s.value) for part, (factor, s) in terms.items()},
        name=name,
        estimator=estimator,
    )


def _check_eta(eta: float) -> None:
    if not math.isfinite(eta):
        raise ValueError(f"eta is {eta!r}, expected a finite number")


def _check_same_rollouts(first: Estimate, second: Estimate) -> None:
    for field in ("per", "prompts"):
        one, other = getattr(first, field), getattr(second, field)
        if one != other:
            raise ValueError(f"second has {field}={other!r}, expected {one!r} as first has")
    if not np.array_equal(first.group, second.group):
        raise ValueError("second is of other rollouts than first: their groups differ")
