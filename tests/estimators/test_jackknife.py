"""The leave-one-out jackknife against really leaving rows out and computing everything anew."""

import dataclasses

import numpy as np
import pytest
from oracles import TinyPolicy, repeat_rows

from dentropy.estimators import curvature, importance, predict, prediction_error, slope, trust_range

POLICY = TinyPolicy()
COLUMNS, MOVED = POLICY.columns(), POLICY.columns(0.2)
STATISTICS = {
    "causal": lambda base, moved, **how: slope(base, **how),
    "exact": lambda base, moved, **how: slope(base, estimator="exact", **how),
    "mixed": lambda base, moved, **how: slope(base, estimator="mixed", **how),
    "curvature": lambda base, moved, **how: curvature(base, **how),
    "importance": lambda base, moved, **how: importance(base, moved, **how),
    "prediction": lambda base, moved, **how: predict(base, 0.2, order=2, **how),
    "prediction error": lambda base, moved, **how: prediction_error(base, moved, 0.2, order=2, **how),
    "trust range": lambda base, moved, **how: trust_range(slope(base, **how), curvature(base, **how)),
}
statistic_all = pytest.mark.parametrize("statistic", STATISTICS)
per_both = pytest.mark.parametrize("per", ["token", "sequence"])


def tables(seed=0, n_groups=7, per_group=4):
    """A table at η = 0 and one at 0.2: groups of unequal size, labels in no order."""
    rng = np.random.default_rng(seed)
    (prompt,), (sequence,) = POLICY.sample(rng, 1, n_groups=n_groups, per_group=per_group)
    group = 5 - 3 * (np.arange(len(prompt)) // per_group)
    group[[5, 17]] = group[0], group[0]
    order = np.random.default_rng(seed + 1).permutation(len(prompt))

    def scored(columns):
        sums = dataclasses.replace(POLICY.table(prompt, sequence, columns, per_group=per_group), group=group)
        return dataclasses.replace(sums, **{name: c[order] for name, c in sums.columns().items()})

    return scored(COLUMNS), scored(MOVED)


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
@pytest.mark.parametrize("prompts", ["random", "fixed"])
def test_agrees_with_the_delta_method_in_large_batches(statistic, prompts):
    (prompt,), (sequence,) = POLICY.sample(np.random.default_rng(3), 1, n_groups=2000)
    base, moved = (POLICY.table(prompt, sequence, columns) for columns in (COLUMNS, MOVED))
    found = STATISTICS[statistic](base, moved, prompts=prompts)
    assert found.jackknife_stderr == pytest.approx(found.delta_stderr, rel=0.01)
    assert found.stderr == found.delta_stderr and found.warnings == ()


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
    error = prediction_error(base, heavy, 0.2)
    assert error.jackknife_reason == result.jackknife_reason and error.stderr == error.delta_stderr


def test_groups_without_a_standard_error_have_no_jackknife_either():
    base, _ = tables()
    one_group = slope(dataclasses.replace(base, group=np.zeros(len(base), dtype=int)))
    assert one_group.jackknife_stderr is None and one_group.jackknife_reason == one_group.stderr_reason
    alone = slope(dataclasses.replace(base, group=np.arange(len(base))), prompts="fixed")
    assert alone.leave_one_out is None and "has one rollout" in alone.jackknife_reason
    assert alone.warnings == () and alone.dof is None
