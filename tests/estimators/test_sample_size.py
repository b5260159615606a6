"""How many rollouts an error bar takes: against the error bars of larger batches."""

import dataclasses

import numpy as np
import pytest
from tables import POLICY, columns, in_one_group

from dentropy.estimators import curvature, importance, rollouts_needed, slope


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
    assert rollouts_needed(estimate, wanted) == (256, 64)
    assert typical_stderr([statistic(sums) for sums in tables(300, 64)]) == pytest.approx(wanted, rel=0.05)


def test_on_fixed_prompts_the_rollouts_per_prompt_grow():
    small = [slope(sums, prompts="fixed") for sums in tables(300, 16, prompts="fixed")]
    estimate = dataclasses.replace(small[0], stderr=typical_stderr(small))
    wanted = estimate.stderr / 2
    assert rollouts_needed(estimate, wanted) == (256, 16)
    large = [slope(sums, prompts="fixed") for sums in tables(300, 16, per_group=16, prompts="fixed")]
    assert typical_stderr(large) == pytest.approx(wanted, rel=0.05)


def test_rounding_up_and_the_least_there_is():
    (sums,) = tables(1, 16)
    estimate = slope(sums)
    assert rollouts_needed(estimate, estimate.stderr) == (64, 16)
    assert rollouts_needed(estimate, 0.999 * estimate.stderr) == (68, 17)
    assert rollouts_needed(estimate, 100 * estimate.stderr) == (8, 2)
    fixed = slope(sums, prompts="fixed")
    assert rollouts_needed(fixed, 0.999 * fixed.stderr) == (80, 16)
    assert rollouts_needed(fixed, 100 * fixed.stderr) == (32, 16)
    assert rollouts_needed(importance(sums, sums), 1e-6) == (8, 2)  # nothing moved: stderr is 0


def test_bad_input():
    (sums,) = tables(1, 16)
    for stderr in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="stderr: .*, expected a positive number"):
            rollouts_needed(slope(sums), stderr)
    with pytest.raises(ValueError, match="estimate: no standard error, expected one to start from: all 64"):
        rollouts_needed(slope(in_one_group(sums)), 0.1)
