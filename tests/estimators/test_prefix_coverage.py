"""Bias and coverage of the causal forms, over many batches of 64 rollouts (16 groups of 4) of redrawn prompts.

The intervals are those that users get, value ± t·stderr. 300 batches by default, with bounds wider by what chance does
to so few, and 5,000 in the slow form.
"""

import numpy as np
import pytest
from chains import ChainPolicy
from tables import POLICY, per_both, prompts_both, table_with_tokens

from dentropy.estimators import curvature, importance, predict, prediction_error, slope

ETA = 0.1
QUICK = 300
sizes = pytest.mark.parametrize("n_batches", [QUICK, pytest.param(5000, marks=pytest.mark.slow)])


def tiny(n_batches, prompts="random"):
    """(base, moved) tables with tokens of the enumerable policy, one pair after the other."""
    drawn = POLICY.sample(np.random.default_rng(22), n_batches, prompts=prompts)
    for batch in zip(*drawn, strict=True):
        yield tuple(table_with_tokens(*batch, eta) for eta in (0.0, ETA))


def check(estimates, truth, least=0.91, most=0.97):
    """The mean is within 4 standard errors and a ratio bias of a tenth of a standard deviation; the intervals cover."""
    estimates = list(estimates)
    value = np.array([e.value for e in estimates])
    low, high = np.array([e.interval() for e in estimates]).T
    deviation = value.std(ddof=1)
    assert abs(value.mean() - truth) < 4 * deviation / np.sqrt(value.size) + 0.1 * deviation
    covered = np.mean((low < truth) & (truth < high))
    slack = 3 * (0.95 * 0.05 / value.size) ** 0.5 if value.size == QUICK else 0.0
    assert least - slack < covered < most + slack


@sizes
@per_both
@prompts_both
def test_curvature_and_importance(prompts, per, n_batches):
    before, _, second = POLICY.truth(0.0, per)
    found = [
        (
            curvature(base, estimator="causal", per=per, prompts=prompts),
            importance(base, moved, weights="prefix", per=per, prompts=prompts),
        )
        for base, moved in tiny(n_batches, prompts)
    ]
    check([second for second, _ in found], second)
    check([measured for _, measured in found], POLICY.truth(ETA, per)[0] - before)


@sizes
@per_both
def test_prediction_error(per, n_batches):
    before, first, second = POLICY.truth(0.0, per)
    errors = []
    for base, moved in tiny(n_batches):
        predicted = predict(slope(base, per=per), ETA, curvature(base, estimator="causal", per=per))
        errors.append(prediction_error(predicted, importance(base, moved, weights="prefix", per=per)))
    check(errors, ETA * first + ETA**2 * second / 2 - (POLICY.truth(ETA, per)[0] - before))


@sizes
@pytest.mark.parametrize("end_drift", [0.0, 1.0], ids=["chain", "chain that grows shorter"])
def test_chains(end_drift, n_batches):
    policy, eta = ChainPolicy(end=-3.5, end_drift=end_drift), 0.05
    rollouts = policy.sample(np.random.default_rng(23), 64 * n_batches, 4)
    base, moved = rollouts.tables(0.0, n_batches, order=2), rollouts.tables(eta, n_batches)
    before, _, second = policy.truth()
    check((curvature(sums, estimator="causal") for sums in base), second, 0.90)
    measured = (importance(*pair, weights="prefix") for pair in zip(base, moved))
    check(measured, policy.truth(eta)[0] - before)
