"""Predictions against enumeration, their errors against the measurement, and the range they hold in."""

import dataclasses

import numpy as np
import pytest
from oracles import TinyPolicy, influence_by_repetition, repeat_rows
from tables import (
    ESTIMATORS,
    FIRST_ORDER,
    POLICY,
    SECOND_ORDER,
    estimator_all,
    in_one_group,
    one_table,
    order_both,
    per_both,
    predicted,
)

from dentropy.estimators import curvature, importance, predict, prediction_error, slope, trust_range


def error_of(base, moved, eta, per="token", **how):
    """The prediction's error from two tables."""
    return prediction_error(predicted(base, eta, per=per, **how), importance(base, moved, per=per))


def along(sums, c):
    """The table for the direction c·v."""
    scaled = {name: c * getattr(sums, name) for name in FIRST_ORDER}
    return dataclasses.replace(sums, **scaled, **{name: c**2 * getattr(sums, name) for name in SECOND_ORDER})


@per_both
@estimator_all
def test_prediction_is_taylor_s(estimator, per):
    sums, eta = one_table(), 0.3
    first, second = slope(sums, estimator=estimator, per=per), curvature(sums, per=per)
    linear, quadratic = predict(first, eta), predict(first, eta, second)
    assert linear.value == pytest.approx(eta * first.value, rel=1e-14)
    assert quadratic.value == pytest.approx(eta * first.value + eta**2 * second.value / 2, rel=1e-13)
    assert linear.stderr == pytest.approx(eta * first.stderr, rel=1e-12)
    assert quadratic.parts == pytest.approx(
        {"linear": eta * first.value, "quadratic": eta**2 * second.value / 2}, rel=1e-13
    )
    for estimate in (linear, quadratic):
        scale = np.abs(estimate.contributions).sum()
        assert abs(estimate.contributions.sum() - estimate.value) < 1e-14 * scale
        assert (estimate.name, estimate.estimator, estimate.per) == ("prediction", estimator, per)


@per_both
@order_both
def test_a_large_batch_predicts_the_true_change_to_its_order(order, per):
    base = one_table(1, n_groups=20_000)
    for eta in (0.02, 0.04):
        truth = POLICY.truth(eta, per)[0] - POLICY.truth(0.0, per)[0]
        estimate = predicted(base, eta, order, "exact", per)
        _, first, second = POLICY.truth(0.0, per)
        remainder = abs(truth - eta * first - (eta**2 * second / 2 if order == 2 else 0))
        assert abs(estimate.value - truth) < 4 * estimate.stderr + 1.01 * remainder


@per_both
@order_both
@estimator_all
def test_error_is_prediction_less_measurement_rollout_by_rollout(estimator, order, per):
    base, moved, how = one_table(), one_table(eta=0.2), {"order": order, "estimator": estimator, "per": per}
    ahead, measured = predicted(base, 0.2, **how), importance(base, moved, per=per)
    error = prediction_error(ahead, measured)
    assert (error.name, error.estimator, error.per) == ("prediction error", estimator, per)
    assert error.value == pytest.approx(ahead.value - measured.delta, rel=1e-12)
    assert error.parts == pytest.approx({"prediction": ahead.value, "measurement": -measured.delta})
    contributions = ahead.contributions - measured.contributions
    np.testing.assert_allclose(error.contributions, contributions, atol=1e-15)
    if estimator == "exact":  # the two share their noise
        assert error.stderr < 0.5 * np.hypot(ahead.stderr, measured.stderr)


@per_both
@order_both
def test_influence_is_the_derivative_with_respect_to_a_rollout_s_weight(order, per):
    base, moved = one_table(2, n_groups=6, per_group=2), one_table(2, eta=0.2, n_groups=6, per_group=2)
    for function in (
        lambda b, m: predicted(b, 0.2, order, per=per),
        lambda b, m: error_of(b, m, 0.2, order=order, per=per),
    ):

        def value(counts, function=function):
            return function(repeat_rows(base, counts), repeat_rows(moved, counts)).value

        numeric, found = influence_by_repetition(value, len(base)), function(base, moved).influence
        np.testing.assert_allclose(found, numeric, atol=1e-5 * np.abs(numeric).max())


@per_both
def test_the_error_of_the_exact_linear_prediction_is_the_curvature_s_term(per):
    base, eta = one_table(3), 1e-3
    error = error_of(base, one_table(3, eta), eta, estimator="exact", per=per)
    assert error.value == pytest.approx(-(eta**2) * curvature(base, per=per).value / 2, rel=0.01)
    left = error_of(base, one_table(3, eta), eta, order=2, estimator="exact", per=per)
    assert abs(left.value) < 0.01 * abs(error.value)


@pytest.mark.parametrize("c", [3.0, 1e-4])
def test_the_direction_s_length_scales_out(c):
    base = one_table(4)
    scaled = along(base, c)
    for estimator in ESTIMATORS:
        one, other = slope(base, estimator=estimator), slope(scaled, estimator=estimator)
        assert other.value == pytest.approx(c * one.value, rel=1e-12)
        assert other.stderr == pytest.approx(c * one.stderr, rel=1e-11)
    assert curvature(scaled).value == pytest.approx(c**2 * curvature(base).value, rel=1e-12)
    assert predicted(scaled, 0.3 / c, 2).value == pytest.approx(predicted(base, 0.3, 2).value, rel=1e-12)
    here, there = trust_range(slope(base), curvature(base)), trust_range(slope(scaled), curvature(scaled))
    assert there.eta_star * c == pytest.approx(here.eta_star, rel=1e-12)
    assert there.stderr * c == pytest.approx(here.stderr, rel=1e-9)


@per_both
def test_trust_range_is_where_the_two_terms_are_equal(per):
    sums = one_table(5)
    first, second = slope(sums, per=per), curvature(sums, per=per)
    reach = trust_range(first, second)
    parts = predict(first, reach.eta_star, second).parts
    assert abs(parts["linear"]) == pytest.approx(abs(parts["quadratic"]), rel=1e-12)
    for sign in (1, -1):
        linear = predict(first, sign * reach.linear_limit).value
        quadratic = predict(first, sign * reach.linear_limit, second).value
        assert abs(quadratic - linear) == pytest.approx(0.1 * abs(linear), rel=1e-9)


@per_both
def test_trust_range_has_an_error(per):
    sums = one_table(6, n_groups=6, per_group=2)

    def eta_star(counts):
        rows = repeat_rows(sums, counts)
        return trust_range(slope(rows, per=per), curvature(rows, per=per)).value

    numeric = influence_by_repetition(eta_star, len(sums))
    found = trust_range(slope(sums, per=per), curvature(sums, per=per)).influence
    np.testing.assert_allclose(found, numeric, atol=1e-4 * np.abs(numeric).max())


def test_trust_range_of_many_batches_is_as_uncertain_as_it_says():
    policy = TinyPolicy(vocab=3, scale=0.5, end_drift=4.0)  # slope and curvature both far from 0
    columns = policy.columns()
    drawn = zip(*policy.sample(np.random.default_rng(7), 200, n_groups=1000), strict=True)
    tables = [policy.table(*batch, columns) for batch in drawn]
    reach = [trust_range(slope(sums, per="sequence"), curvature(sums, per="sequence")) for sums in tables]
    _, first, second = policy.truth(0.0, "sequence")
    value, stderr = np.array([(r.eta_star, r.stderr) for r in reach]).T
    assert value.mean() == pytest.approx(2 * abs(first / second), rel=0.05)
    assert stderr.mean() == pytest.approx(value.std(), rel=0.1)


def test_trust_range_says_when_slope_or_curvature_is_not_told_apart_from_0():
    sums = one_table(8)
    first, second = slope(sums), curvature(sums)
    vague = trust_range(dataclasses.replace(first, value=first.stderr), second)
    assert "the slope" in vague.warnings[0] and "may be far smaller" in vague.warnings[0]
    vague = trust_range(
        dataclasses.replace(first, value=9 * first.stderr), dataclasses.replace(second, value=-second.stderr)
    )
    assert "the curvature" in vague.warnings[0] and "may be far larger" in vague.warnings[0]
    straight = trust_range(first, dataclasses.replace(second, value=0.0))
    assert straight.eta_star == straight.linear_limit == np.inf
    assert straight.stderr is None and straight.stderr_reason == "the curvature is 0"
    assert straight.interval() is None


def test_bad_input():
    base, moved = one_table(), one_table(eta=0.2)
    first, measured = slope(base), importance(base, moved)
    for eta in (np.nan, np.inf):
        with pytest.raises(ValueError, match="eta: (nan|inf), expected a finite number"):
            predict(first, eta)
    ahead = predict(first, 0.1)
    with pytest.raises(ValueError, match="first: a SequenceSums, expected a slope"):
        predict(base, 0.1)
    with pytest.raises(ValueError, match="predicted: a slope, expected a prediction"):
        prediction_error(first, measured)
    with pytest.raises(ValueError, match="measured: a SequenceSums, expected an ImportanceResult"):
        prediction_error(ahead, moved)


@pytest.mark.parametrize("both", [trust_range, lambda first, second: predict(first, 0.1, second)])
def test_slope_and_curvature_must_be_of_the_same_rollouts(both):
    base = one_table()
    first, second = slope(base), curvature(base)
    for arguments, message in (
        ((second, second), "first: a curvature, expected a slope"),
        ((first, first), "second: a slope, expected a curvature"),
        ((first, curvature(base, per="sequence")), "second: per='sequence', expected 'token'"),
        ((first, curvature(base, prompts="fixed")), "second: prompts='fixed', expected 'random'"),
        ((first, curvature(one_table(1, n_groups=17))), "second: of other rollouts"),
    ):
        with pytest.raises(ValueError, match=message):
            both(*arguments)


def test_prediction_and_measurement_must_be_of_the_same_rollouts():
    base, moved = one_table(), one_table(eta=0.2)
    ahead = predict(slope(base), 0.2)
    for measured, message in (
        (importance(base, moved, per="sequence"), "measured: per='sequence', expected 'token'"),
        (importance(base, moved, prompts="fixed"), "measured: prompts='fixed', expected 'random'"),
        (importance(in_one_group(base), in_one_group(moved)), "measured: of other rollouts"),
    ):
        with pytest.raises(ValueError, match=message):
            prediction_error(ahead, measured)
