"""Which standard error is reported, its interval, and the warnings in words."""

import dataclasses

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq
from tables import in_one_group, one_table, prompts_both

from dentropy.estimators import curvature, difference, importance, predict, prediction_error, slope, trust_range
from dentropy.estimators.estimate import Statistic
from dentropy.estimators.groups import Groups
from dentropy.estimators.jackknife import leave_one_out


def errors_of_a_mean(values, group, prompts="random"):
    """The statistic for a mean of `values`, whose two standard errors are one where the groups are equal."""
    groups, ones = Groups.of(np.asarray(group), prompts), np.ones(values.size)
    left_out = leave_one_out(lambda count, total: total / count, [ones, values], 1, groups)
    influence = (values - values.mean()) / values.size
    return Statistic.of(values.mean(), influence, left_out, groups, per="token")


@prompts_both
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_interval_is_student_s(prompts, level):
    for estimate in (
        slope(one_table(), prompts=prompts),
        curvature(one_table(), prompts=prompts),
        importance(one_table(), one_table(), prompts=prompts),
    ):
        tokens = np.bincount(estimate.group, one_table().n_tokens)  # as many rollouts in each group, not as many tokens
        uneven = tokens.sum() ** 2 / np.sum(tokens**2) - 1
        within = estimate.influence.reshape(16, 4)
        kurtosis = stats.kurtosis((within - within.mean(1, keepdims=True)).ravel(), fisher=False)
        dof = uneven if prompts == "random" else min(48, 2 * 64 / (kurtosis - 1))  # around means, whose own is 0
        assert estimate.dof == pytest.approx(dof, rel=1e-9) and estimate.prompts == prompts
        assert 0.85 * 15 < uneven <= 15
        expected = stats.t.interval(level, estimate.dof, estimate.value, 1.0)
        found = estimate.interval(level)
        half = (np.array(expected) - estimate.value) * estimate.stderr
        np.testing.assert_allclose(found, estimate.value + half, rtol=1e-9)


def test_no_stderr_is_no_interval():
    estimate = slope(in_one_group(one_table()))
    assert estimate.interval() is None and estimate.dof is None and estimate.stderr is None
    for level in (0, 1, 95, float("nan")):
        with pytest.raises(ValueError, match="level: .*, expected a number between 0 and 1"):
            slope(one_table()).interval(level)


def test_the_jackknife_is_reported_and_named_where_the_two_disagree():
    seen = {"delta": 0, "jackknife": 0}
    for seed in range(60):
        estimate = curvature(one_table(seed, n_groups=12))
        ratio = estimate.jackknife_stderr / estimate.delta_stderr
        assert estimate.stderr == estimate.jackknife_stderr
        if max(ratio, 1 / ratio) > 1.1:
            seen["jackknife"] += 1
            assert "the jackknife's standard error" in estimate.warnings[-1]
            assert f"{estimate.delta_stderr:.3g}" in estimate.warnings[-1]
        else:
            seen["delta"] += 1
            assert not any("jackknife" in warning for warning in estimate.warnings)
    assert seen["delta"] > 10 and seen["jackknife"] > 3


def test_rounding_is_no_disagreement():
    sums = one_table()
    same = dataclasses.replace(
        sums, **{n: np.full(64, c[0]) for n, c in sums.columns().items() if n not in ("group", "rollout")}
    )
    for estimate in (slope(same), slope(same, prompts="fixed"), importance(same, same)):
        assert estimate.stderr == pytest.approx(0, abs=1e-15)
        assert not any("jackknife" in warning for warning in estimate.warnings)


def test_few_groups_are_named():
    values = np.random.default_rng(0).standard_normal(400)
    few = errors_of_a_mean(values[:90], np.repeat(np.arange(9), 10)).warnings
    assert few[0].startswith("few groups: 9 groups give 8 degrees of freedom") and "25%" in few[0]
    enough = errors_of_a_mean(values, np.repeat(np.arange(40), 10))
    assert enough.warnings == () and enough.dof == 39
    pairs = errors_of_a_mean(values[:8], np.repeat(np.arange(4), 2), "fixed")
    assert any(w.startswith("few groups: 8 rollouts in 4 groups give 4 degrees") for w in pairs.warnings)


def test_a_dominant_group_is_named():
    values = np.random.default_rng(0).standard_normal(160)
    group = np.repeat(np.arange(16) * 10, 10)
    assert errors_of_a_mean(values, group).warnings == ()
    sums = values.reshape(16, 10).sum(1) - values.sum() / 16
    # lift group 70 until its squared sum is 60% of all
    lift = brentq(lambda x: share(sums + x * (np.eye(16)[7] - 1 / 16)) - 0.6, 0, 1000)
    lifted = values + np.where(group == 70, lift / 10, 0.0)
    assert errors_of_a_mean(lifted, group).warnings == ("group 70 alone makes 60% of the squared standard error",)
    within = values + np.where(np.arange(160) == 33, 60.0, 0.0)
    (warning,) = [w for w in errors_of_a_mean(within, group, "fixed").warnings if "alone" in w]
    assert warning.startswith("one rollout of group 30 alone makes")


def share(sums):
    return np.max(sums**2) / np.sum(sums**2)


@prompts_both
def test_rollouts_of_little_entropy_say_so(prompts):
    base, moved = one_table(), one_table(0, 0.1)
    scale = 49.9 / base.entropy.sum()
    for factor, expected in ((scale, True), (1.01 * scale, False)):
        sums = dataclasses.replace(base, entropy=factor * base.entropy)
        first, measured = slope(sums, prompts=prompts), importance(sums, moved, prompts=prompts)
        second, line = curvature(sums, prompts=prompts), predict(first, 0.1)
        of_two = line, prediction_error(line, measured), trust_range(first, second), difference(first, first)
        for estimate in (first, second, measured, *of_two):
            assert any("nats of entropy in all, below 50" in w for w in estimate.warnings) == expected
    assert "hold 50 nats" in slope(dataclasses.replace(base, entropy=scale * base.entropy)).warnings[0]


def test_unequal_groups_have_fewer_degrees_of_freedom():
    values, group = np.random.default_rng(0).standard_normal(40), np.repeat([0, 1, 2, 3, 4], [2, 4, 6, 8, 20])
    assert errors_of_a_mean(values, group).dof == pytest.approx(1600 / 520 - 1, rel=1e-12)
    assert errors_of_a_mean(values, group, "fixed").groups.dof == 35
    assert errors_of_a_mean(values, (np.arange(40) == 0).astype(int)).dof == 1  # not 0.05


def test_normal_groups_are_seldom_warned_about():
    rng = np.random.default_rng(1)
    warned = [bool(errors_of_a_mean(rng.standard_normal(16), np.arange(16)).warnings) for _ in range(2000)]
    assert np.mean(warned) < 0.03
