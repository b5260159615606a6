"""The leave-one-out jackknife against really leaving rows out and computing everything anew."""

import dataclasses

import numpy as np
import pytest
from oracles import repeat_rows
from tables import in_one_group, one_table, per_both, prompts_both, take

from dentropy.estimators import curvature, importance, predict, prediction_error, slope, trust_range

STATISTICS = {
    "causal": lambda base, moved, **how: slope(base, **how),
    "exact": lambda base, moved, **how: slope(base, estimator="exact", **how),
    "mixed": lambda base, moved, **how: slope(base, estimator="mixed", **how),
    "curvature": lambda base, moved, **how: curvature(base, **how),
    "importance": lambda base, moved, **how: importance(base, moved, **how),
    "prediction": lambda base, moved, **how: predict(slope(base, **how), 0.2, curvature(base, **how)),
    "prediction error": lambda base, moved, **how: prediction_error(
        predict(slope(base, **how), 0.2, curvature(base, **how)), importance(base, moved, **how)
    ),
    "trust range": lambda base, moved, **how: trust_range(slope(base, **how), curvature(base, **how)),
}
statistic_all = pytest.mark.parametrize("statistic", STATISTICS)


def tables(seed=0, n_groups=7, per_group=4):
    """A table at η = 0 and one at 0.2: groups of unequal size, labels in no order."""
    count = n_groups * per_group
    group = 5 - 3 * (np.arange(count) // per_group)
    group[[5, 17]] = group[0], group[0]
    order = np.random.default_rng(seed + 1).permutation(count)
    return tuple(
        take(dataclasses.replace(one_table(seed, eta, n_groups, per_group), group=group), order) for eta in (0.0, 0.2)
    )


def weighted(statistic, base, moved, counts, per):
    return STATISTICS[statistic](repeat_rows(base, counts), repeat_rows(moved, counts), per=per).value


@per_both
@statistic_all
def test_random_prompts_leave_out_one_group_at_a_time(statistic, per):
    base, moved = tables()
    found = STATISTICS[statistic](base, moved, per=per)
    labels = np.unique(base.group)
    expected = [weighted(statistic, base, moved, base.group != label, per) for label in labels]
    np.testing.assert_allclose(found.leave_one_out, expected, rtol=1e-10)
    count = labels.size
    by_hand = np.sqrt((count - 1) / count * np.sum((expected - np.mean(expected)) ** 2))
    assert found.jackknife_stderr == pytest.approx(by_hand, rel=1e-9)


@per_both
@statistic_all
def test_fixed_prompts_leave_out_one_rollout_and_keep_the_prompt_s_weight(statistic, per):
    base, moved = tables()
    found = STATISTICS[statistic](base, moved, per=per, prompts="fixed")
    members = np.array([np.sum(base.group == label) for label in base.group])
    expected = []
    for row in range(len(base)):
        # the others of its prompt count m / (m − 1) each
        mates, m = base.group == base.group[row], members[row]
        counts = np.where(mates, m, m - 1)
        counts[row] = 0
        expected.append(weighted(statistic, base, moved, counts, per))
    expected = np.array(expected)
    np.testing.assert_allclose(found.leave_one_out, expected, rtol=1e-10)
    squares = 0.0
    for label in np.unique(base.group):
        mine = expected[base.group == label]
        squares += (mine.size - 1) / mine.size * np.sum((mine - mine.mean()) ** 2)
    assert found.jackknife_stderr == pytest.approx(np.sqrt(squares), rel=1e-9)


@pytest.mark.parametrize("statistic", [name for name in STATISTICS if name != "trust range"])
@prompts_both
def test_agrees_with_the_delta_method_in_large_batches(statistic, prompts):
    base, moved = one_table(3, n_groups=2000), one_table(3, 0.2, n_groups=2000)
    found = STATISTICS[statistic](base, moved, prompts=prompts)
    assert found.jackknife_stderr == pytest.approx(found.delta_stderr, rel=0.01)
    assert found.stderr == found.jackknife_stderr and found.warnings == ()


def test_a_group_that_holds_all_the_weight_cannot_be_left_out():
    base, moved = tables()
    heavy = dataclasses.replace(moved, logp=moved.logp + np.where(base.group == 2, 40.0, 0.0))
    result = importance(base, heavy)
    assert result.leave_one_out is None and result.jackknife_stderr is None
    assert result.stderr == result.delta_stderr > 0
    assert result.jackknife_reason.startswith("group 2 holds all but a millionth of the weight")
    assert f"no jackknife standard error: {result.jackknife_reason}" in result.warnings
    one = dataclasses.replace(moved, logp=moved.logp + np.where(np.arange(len(base)) == 9, 40.0, 0.0))
    reason = importance(base, one, prompts="fixed").jackknife_reason
    assert reason.startswith(f"one rollout of group {base.group[9]} holds all")
    error = prediction_error(predict(slope(base), 0.2), result)
    assert error.jackknife_reason == result.jackknife_reason and error.stderr == error.delta_stderr


def test_groups_without_a_standard_error_have_no_jackknife_either():
    base, _ = tables()
    one_group = slope(in_one_group(base))
    assert one_group.jackknife_stderr is None and one_group.jackknife_reason == one_group.stderr_reason
    alone = slope(dataclasses.replace(base, group=np.arange(len(base))), prompts="fixed")
    assert alone.leave_one_out is None and "has one rollout" in alone.jackknife_reason
    assert alone.warnings == () and alone.dof is None
