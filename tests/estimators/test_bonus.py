"""The coefficient of a bonus against the root of the enumerated slope."""

import numpy as np
import pytest
from oracles import TinyPolicy

from dentropy.estimators import bonus_coefficient, curvature, slope

ETA, TARGET = 0.01, 0.002


@pytest.fixture(scope="module")
def setting():
    """An enumerable policy, its columns along two directions, and the coefficient that hits the target."""
    policy, rng = TinyPolicy(), np.random.default_rng(4)
    policy.C = np.zeros_like(policy.A)
    drawn = policy.sample(np.random.default_rng(9), 400)
    update = policy.B
    bonus = -policy.A + 0.3 * rng.standard_normal(policy.A.shape)  # flatter, as a bonus makes it
    columns, slopes = [], []
    for policy.B in (update, bonus):
        columns.append(policy.columns())
        slopes.append(policy.truth()[1])
    root = (TARGET / ETA - slopes[0]) / slopes[1]
    policy.B = update + root * bonus
    assert policy.truth()[1] == pytest.approx(TARGET / ETA, rel=1e-10)  # it is the root of the enumerated slope
    return policy, columns, drawn, root


@pytest.mark.parametrize("n_batches", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_intervals_cover_the_enumerated_root(setting, n_batches):
    policy, columns, drawn, root = setting
    found = []
    drawn = drawn if n_batches == 400 else policy.sample(np.random.default_rng(10), n_batches)
    for batch in zip(*drawn, strict=True):
        update, bonus = (slope(policy.table(*batch, c)) for c in columns)
        found.append(bonus_coefficient(TARGET, update, bonus, eta=ETA))
    inside = [ends is not None and ends[0] < root < ends[1] for ends in (f.interval for f in found)]
    slack = 3 * (0.95 * 0.05 / n_batches) ** 0.5 if n_batches == 400 else 0.0
    assert 0.93 - slack < np.mean(inside) < 0.97 + slack
    values = np.array([f.value for f in found])
    assert abs(np.median(values) - root) < 4 * 1.25 * values.std() / len(values) ** 0.5


def test_the_combined_slope_of_the_batch_hits_the_target(setting):
    policy, columns, drawn, _ = setting
    batch = drawn[0][0], drawn[1][0]
    update, bonus = (slope(policy.table(*batch, c)) for c in columns)
    found = bonus_coefficient(TARGET, update, bonus, eta=ETA)
    assert ETA * (update.value + found.value * bonus.value) == pytest.approx(TARGET, rel=1e-12)
    for end in found.interval:  # at either end the target is at the edge of what the combined slope allows
        influence = update.influence + end * bonus.influence
        stderr = update.groups.stderr(influence)[0]
        edge = abs(update.value + end * bonus.value - TARGET / ETA) / stderr
        assert edge == pytest.approx(abs(update.interval()[1] - update.value) / update.stderr, rel=1e-9)


def test_what_cannot_be_told_and_what_is_refused(setting):
    policy, columns, drawn, _ = setting
    batch = drawn[0][0], drawn[1][0]
    table = policy.table(*batch, columns[0])
    update, bonus = table, policy.table(*batch, columns[1])
    noise = {"dentropy": np.random.default_rng(0).normal(size=len(table))}
    lost = type(table)(
        **{**table.columns(), **noise, "entropy_to_go": 0 * table.dlogp, "length_to_go": 0 * table.dlogp}
    )
    found = bonus_coefficient(0.0, slope(update), slope(lost))
    assert found.interval is None and found.reason == "the bonus's slope is not told apart from 0"
    one = type(table)(**{**table.columns(), "group": np.zeros(len(table), int)})
    found = bonus_coefficient(0.0, slope(one), slope(one))
    assert found.value == -1 and found.interval is None and "one group" in found.reason
    for arguments, said in [
        ((np.nan, slope(update), slope(bonus)), "target: nan"),
        ((0.0, slope(update), slope(bonus, estimator="exact")), "bonus: the exact slope, expected the causal one"),
        ((0.0, curvature(update), slope(bonus)), "update: a curvature, expected a slope"),
        ((0.0, slope(update), slope(one)), "bonus: of other rollouts"),
    ]:
        with pytest.raises(ValueError, match=said):
            bonus_coefficient(*arguments)
    with pytest.raises(ValueError, match="eta: 0"):
        bonus_coefficient(0.0, slope(update), slope(bonus), eta=0)
