"""The prediction ΔH(η) ≈ η R' (+ η² R''/2), its error against the measurement, and how far to trust it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from dentropy.estimators.estimate import Estimate, Statistic, check_estimate, check_same_rollouts
from dentropy.estimators.importance_sampling import ImportanceResult
from dentropy.estimators.jackknife import LeftOut

# Where the quadratic prediction differs from the linear one by this fraction of it.
LINEAR_TOLERANCE = 0.1


def predict(first: Estimate, eta: float, second: Estimate | None = None) -> Estimate:
    """The change of entropy predicted from the base weights alone: η R', with a curvature also η² R''/2.

    Args:
        first: R', what `slope` gave.
        eta: η, in units of the direction.
        second: R'', what `curvature` gave for the same table with the same `per` and `prompts`.

    Returns:
        Estimate of ΔH(η) in nats per token (or per sequence), named "prediction". Its parts linear and, with
        `second`, quadratic add up to value.

    Raises:
        ValueError: an `eta` that is not finite; estimates of other kinds, or of different rollouts, `per` or
            `prompts`.

    Example:
        >>> import torch
        >>> from dentropy import curvature, predict, sequence_sums, slope, token_stats
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits, d2logits = torch.randn(3, 6, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits, d2logits)
        >>> sums = sequence_sums(stats, torch.tensor([0, 3, 4, 6]))
        >>> first, second = slope(sums), curvature(sums)
        >>> predict(first, 0.5).value == 0.5 * first.value
        True
        >>> predict(first, 0.5, second).value == 0.5 * first.value + 0.125 * second.value
        True
    """
    if not math.isfinite(eta):
        raise ValueError(f"eta: {eta!r}, expected a finite number")
    _check_pair(first, second)
    terms = {"linear": (eta, first)}
    if second is not None:
        terms["quadratic"] = (eta**2 / 2, second)
    return _combine(terms, name="prediction", estimator=first.estimator)


def prediction_error(predicted: Estimate, measured: ImportanceResult) -> Estimate:
    """Prediction less measurement of ΔH(η), on the same rollouts.

    The two are far from independent: the standard error comes from the difference of their influence values,
    rollout by rollout. With the exact slope and sequence weights, or the causal slope and prefix weights, chance does
    nearly the same to both and what is left is what the Taylor expansion leaves out on these very rollouts; another
    pair adds the difference of the two slopes, whose expectation is 0.

    Args:
        predicted: what `predict` gave for a table at the base weights.
        measured: what `importance` gave for that table and one at θ + η·v, with the same `per` and `prompts`.

    Returns:
        Estimate in nats per token (or per sequence), named "prediction error". Its parts prediction and
        measurement (which is −ΔH) add up to value.

    Raises:
        ValueError: arguments of other kinds, or of different rollouts, `per` or `prompts`.

    Example:
        >>> import torch
        >>> from dentropy import importance, predict, prediction_error, sequence_sums, slope, token_stats
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
        >>> targets, ends = torch.tensor([1, 4, 0, 2, 2, 0]), torch.tensor([0, 3, 4, 6])
        >>> base = sequence_sums(token_stats(logits, targets, dlogits), ends)
        >>> moved = sequence_sums(token_stats(logits + 0.1 * dlogits, targets), ends)
        >>> predicted, measured = predict(slope(base), 0.1), importance(base, moved)
        >>> prediction_error(predicted, measured).value == predicted.value - measured.delta
        True
    """
    check_estimate("predicted", predicted, "prediction")
    if not isinstance(measured, ImportanceResult):
        raise ValueError(f"measured: a {type(measured).__name__}, expected an ImportanceResult")
    check_same_rollouts("measured", measured, predicted.groups, predicted.per)
    terms = {"prediction": (1.0, predicted), "measurement": (-1.0, measured)}
    return _combine(terms, name="prediction error", estimator=predicted.estimator)


def difference(first: Statistic, second: Statistic) -> Estimate:
    """first − second with the standard error of the pair, for the two forms of one number on the same rollouts.

    Args:
        first, second: two slopes, two curvatures, or two measurements.

    Returns:
        Estimate in their units, named "difference"; its parts first and second (negated) add up to value.

    Raises:
        ValueError: of different rollouts, `per` or `prompts`.

    Example:
        >>> import torch
        >>> from dentropy import sequence_sums, slope, token_stats
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits)
        >>> sums = sequence_sums(stats, torch.tensor([0, 3, 4, 6]))
        >>> causal, exact = slope(sums), slope(sums, estimator="exact")
        >>> difference(causal, exact).value == causal.value - exact.value
        True
    """
    check_same_rollouts("second", second, first.groups, first.per)
    return _combine({"first": (1.0, first), "second": (-1.0, second)}, name="difference", estimator="")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class TrustRange(Statistic):
    """How far along the direction a prediction can be trusted. The fields of `Statistic` for η*, and:

    eta_star      η* = 2 |R' / R''|, where the linear and the quadratic term are equal; inf where R'' is 0
    linear_limit  0.1 η*: up to here the linear and the quadratic prediction are within 10% of each other
    """

    def _shown(self) -> tuple[str, ...]:
        return "η*", "in units of η"

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
    _check_pair(first, second)
    doubts = _unresolved(first, second)
    if second.value == 0:
        reach = TrustRange.of(
            math.inf, np.zeros_like(first.influence), (None, "η* is infinite"), first.groups, per=first.per
        )
        none = dict.fromkeys(("stderr", "delta_stderr", "dof"))
        return dataclasses.replace(reach, **none, stderr_reason="the curvature is 0", warnings=doubts)
    sign = math.copysign(1.0, first.value) * math.copysign(1.0, second.value)
    relative = first.influence - first.value / second.value * second.influence
    reach = TrustRange.of(
        2 * abs(first.value / second.value),
        2 * sign * relative / second.value,
        _ratio_left_out(first, second),
        first.groups,
        doubts=_doubts(first, second),
        per=first.per,
    )
    return dataclasses.replace(reach, warnings=doubts + reach.warnings)


def _check_pair(first: Estimate, second: Estimate | None) -> None:
    """ValueError unless these are a slope and, if at all, a curvature of the same rollouts."""
    check_estimate("first", first, "slope")
    if second is not None:
        check_estimate("second", second, "curvature")
        check_same_rollouts("second", second, first.groups, first.per)


def _ratio_left_out(first: Estimate, second: Estimate) -> LeftOut:
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


def _doubts(*statistics: Statistic) -> tuple[str, ...]:
    """What is doubtful about any of them because of its table."""
    return tuple(dict.fromkeys(doubt for statistic in statistics for doubt in statistic.doubts))


def _combine(terms: dict[str, tuple[float, Statistic]], *, name: str, estimator: str) -> Estimate:
    """The sum of factor · statistic, all of the same rollouts; the terms become its parts."""
    factors, statistics = zip(*terms.values(), strict=True)

    def total(field: str):
        return sum(factor * getattr(s, field) for factor, s in zip(factors, statistics, strict=True))

    refused = [s.jackknife_reason for s in statistics if s.leave_one_out is None]
    return Estimate.of(
        total("value"),
        total("influence"),
        (None, refused[0]) if refused else (total("leave_one_out"), None),
        statistics[0].groups,
        doubts=_doubts(*statistics),
        per=statistics[0].per,
        contributions=total("contributions"),
        parts={part: float(factor * s.value) for part, (factor, s) in terms.items()},
        name=name,
        estimator=estimator,
    )
