"""Prompt groups: clustered standard errors against textbook forms."""

import numpy as np
import pytest

from dentropy.estimators import clustered_stderr
from dentropy.estimators.groups import Groups


def test_own_group_each_is_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).standard_normal(50)
    stderr, reason = clustered_stderr((values - values.mean()) / 50, np.arange(50))
    assert stderr == pytest.approx(values.std(ddof=1) / np.sqrt(50), rel=1e-12) and reason is None


def test_equal_groups_are_the_standard_error_of_the_mean_of_group_means():
    values = np.random.default_rng(1).standard_normal((8, 5))
    stderr, _ = clustered_stderr((values - values.mean()).ravel() / 40, np.repeat(np.arange(8), 5))
    assert stderr == pytest.approx(values.mean(1).std(ddof=1) / np.sqrt(8), rel=1e-12)


def test_fixed_prompts_are_the_stratified_standard_error():
    rng = np.random.default_rng(2)
    strata = [rng.standard_normal(m) + 10 * m for m in (2, 3, 7)]
    values, group = np.concatenate(strata), np.repeat([5, -1, 40], [2, 3, 7])
    stderr, reason = clustered_stderr((values - values.mean()) / 12, group, "fixed")
    variance = sum((len(s) / 12) ** 2 * s.var(ddof=1) / len(s) for s in strata)
    assert stderr == pytest.approx(np.sqrt(variance), rel=1e-12) and reason is None


def test_labels_and_row_order_do_not_matter():
    rng = np.random.default_rng(3)
    psi, group = rng.standard_normal(30), rng.integers(0, 6, 30).repeat(1)
    order = rng.permutation(30)
    for prompts in ("random", "fixed"):
        expected, _ = clustered_stderr(psi, np.append(group[:-1], group[0]), prompts)
        relabelled = np.append(group[:-1], group[0])[order] * -7 + 2**40
        assert clustered_stderr(psi[order], relabelled, prompts)[0] == pytest.approx(expected, rel=1e-12)


def test_no_stderr_comes_with_its_reason():
    assert clustered_stderr(np.ones(4), np.zeros(4, int)) == (
        None,
        "all 4 rollouts are in one group; prompts='random' needs two groups or more",
    )
    assert clustered_stderr(np.ones(1), np.zeros(1, int)) == (
        None,
        "the only rollout is in one group; prompts='random' needs two groups or more",
    )
    assert clustered_stderr(np.ones(5), np.array([0, 0, 3, 4, 4]), "fixed") == (
        None,
        "group 3 has one rollout (1 of 3 groups do); prompts='fixed' needs two or more in every group",
    )


def test_bad_input():
    with pytest.raises(ValueError, match="prompts: 'drawn', expected one of 'random', 'fixed'"):
        clustered_stderr(np.ones(2), np.arange(2), "drawn")
    with pytest.raises(ValueError, match=r"influence: shape \(0,\)"):
        clustered_stderr(np.ones(0), np.arange(0))
    with pytest.raises(ValueError, match=r"group: shape \(3,\), expected \(2,\)"):
        clustered_stderr(np.ones(2), np.arange(3))


def test_two_samples_of_the_same_prompts():
    """Random prompts: the difference of two means varies with the prompts' own. Fixed: as two stratified samples do."""
    rng = np.random.default_rng(4)
    first, second = (rng.standard_normal((6, 4)) + np.arange(6)[:, None] for _ in range(2))
    labels = 3 * np.repeat(np.arange(6), 4) - 5
    influence = np.concatenate([(first - first.mean()).ravel(), -(second - second.mean()).ravel()]) / 24
    paired, _ = Groups.of_two(labels, labels, "random").stderr(influence)
    assert paired == pytest.approx((first - second).mean(1).std(ddof=1) / np.sqrt(6), rel=1e-12)
    apart, _ = Groups.of_two(labels, labels, "fixed").stderr(influence)
    within = sum(sample.var(1, ddof=1).sum() / 4 for sample in (first, second)) / 36
    assert apart == pytest.approx(np.sqrt(within), rel=1e-12)


def test_a_group_is_named_and_counted():
    group = np.array([7, -2, 7, -2, -2])
    random, fixed = Groups.of(group), Groups.of(group, "fixed")
    assert (random.unit(1), random.count, random.dof) == ("group 7", "2 groups", 1)
    assert (fixed.unit(1), fixed.count, fixed.dof) == ("one rollout of group -2", "5 rollouts in 2 groups", 3)
    assert repr(fixed) == "FixedPrompts(5 rollouts in 2 groups)" and fixed.group.tolist() == group.tolist()


def test_fixed_prompts_with_heavy_tails_have_fewer_degrees_of_freedom():
    """Squares of values of kurtosis κ have the variance (κ − 1) σ⁴; a sum of n that of χ²_f with f = 2n/(κ − 1)."""
    group, values = np.repeat(np.arange(100), 4), np.tile([1.0, -1.0, 0.0, 0.0], 100)
    values[80:] = 0.0  # 40 of 400 are ±1: κ = 10
    random, fixed = Groups.of(group), Groups.of(group, "fixed")
    assert fixed.degrees(fixed.variance_terms(values)) == pytest.approx(2 * 400 / 9, rel=1e-12)
    even = np.tile([1.0, -1.0, 1.0, -1.0], 100)
    assert fixed.degrees(fixed.variance_terms(even)) == fixed.dof == 300
    alone = np.where(np.arange(400) == 7, 1.0, 0.0)
    for terms in (random.variance_terms(values), random.variance_terms(alone)):
        assert random.degrees(terms) == random.dof == 99
    assert 1 <= fixed.degrees(fixed.variance_terms(alone)) < 4
