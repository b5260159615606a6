"""How many rollouts an error bar takes: against the error bars of larger batches."""

import dataclasses

import numpy as np
import pytest
from scipy import stats
from tables import POLICY, columns, in_one_group

from dentropy.estimators import curvature, importance, rollouts_needed, slope
from dentropy.estimators.sample_size import QUANTILE_90, _chi2


def tables(n_batches, n_groups, per_group=4, prompts="random"):
    rng = np.random.default_rng(3)
    drawn = POLICY.sample(rng, n_batches, n_groups=n_groups, per_group=per_group, prompts=prompts)
    return [POLICY.table(*batch, columns(), per_group=per_group) for batch in zip(*drawn, strict=True)]


def typical_stderr(estimates):
    return np.sqrt(np.mean([e.stderr**2 for e in estimates]))


@pytest.mark.parametrize("statistic", [slope, curvature])
def test_batches_of_the_size_named_have_that_error(statistic):
    small = [statistic(sums) for sums in tables(300, 16)]
    estimate = dataclasses.replace(small[0], stderr=typical_stderr(small))
    wanted = estimate.stderr / 2
    assert rollouts_needed(estimate, wanted)[:2] == (256, 64)
    assert typical_stderr([statistic(sums) for sums in tables(300, 64)]) == pytest.approx(wanted, rel=0.05)


def test_on_fixed_prompts_the_rollouts_per_prompt_grow():
    small = [slope(sums, prompts="fixed") for sums in tables(300, 16, prompts="fixed")]
    estimate = dataclasses.replace(small[0], stderr=typical_stderr(small))
    wanted = estimate.stderr / 2
    assert rollouts_needed(estimate, wanted)[:2] == (256, 16)
    large = [slope(sums, prompts="fixed") for sums in tables(300, 16, per_group=16, prompts="fixed")]
    assert typical_stderr(large) == pytest.approx(wanted, rel=0.05)


def test_rounding_up_and_the_least_there_is():
    (sums,) = tables(1, 16)
    estimate = slope(sums)
    assert rollouts_needed(estimate, estimate.stderr)[:2] == (64, 16)
    assert rollouts_needed(estimate, 0.999 * estimate.stderr)[:2] == (68, 17)
    assert rollouts_needed(estimate, 100 * estimate.stderr) == (8, 2, 8, 8)
    fixed = slope(sums, prompts="fixed")
    assert rollouts_needed(fixed, 0.999 * fixed.stderr)[:2] == (80, 16)
    assert rollouts_needed(fixed, 100 * fixed.stderr) == (32, 16, 32, 32)
    assert rollouts_needed(importance(sums, sums), 1e-6) == (8, 2, 8, 8)  # nothing moved: stderr is 0


@pytest.mark.parametrize("per_group, prompts", [(4, "random"), (8, "fixed")])
def test_the_range_holds_the_true_number_in_four_of_five(per_group, prompts):
    estimates = [slope(sums, prompts=prompts) for sums in tables(400, 8, per_group, prompts)]
    wanted = np.std([e.value for e in estimates]) / 4  # a sixteenth of the variance: 16 times the rollouts
    found = [rollouts_needed(e, wanted) for e in estimates]
    needed = 16 * 8 * per_group
    below, above = (np.mean([test(f) for f in found]) for test in (lambda f: needed < f.low, lambda f: needed > f.high))
    assert 0.04 < below < 0.17 and 0.04 < above < 0.17
    assert all(f.low <= f.rollouts <= f.high for f in found)


@pytest.mark.parametrize("dof", [2, 7, 63.5, 4000])
def test_quantiles_of_chi2_without_scipy(dof):
    for z, tail in ((QUANTILE_90, 0.9), (-QUANTILE_90, 0.1)):
        assert _chi2(dof, z) == pytest.approx(stats.chi2.ppf(tail, dof), rel=0.07 if dof == 2 else 0.004)


def test_relative_targets():
    (sums,) = tables(1, 64)
    estimate = slope(sums)
    sure = dataclasses.replace(estimate, value=5 * estimate.stderr)
    assert rollouts_needed(sure, relative=0.1) == rollouts_needed(sure, estimate.stderr / 2)
    for value in (1.9, -1.9, 0.0):
        unsure = dataclasses.replace(estimate, value=value * estimate.stderr)
        with pytest.raises(ValueError, match="relative: of .*, which is not told apart from 0; expected"):
            rollouts_needed(unsure, relative=0.1)
    with pytest.raises(ValueError, match="relative: 0, expected a positive number"):
        rollouts_needed(sure, relative=0)
    for both_or_none in ({}, {"stderr": 0.1, "relative": 0.1}):
        with pytest.raises(ValueError, match="stderr: .* with relative=.*, expected one of the two"):
            rollouts_needed(sure, **both_or_none)


def test_bad_input():
    (sums,) = tables(1, 16)
    for stderr in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="stderr: .*, expected a positive number"):
            rollouts_needed(slope(sums), stderr)
    with pytest.raises(ValueError, match="estimate: no standard error, expected one to start from: all 64"):
        rollouts_needed(slope(in_one_group(sums)), 0.1)
