"""The curvature against the second difference of the measurement and enumeration."""

import dataclasses

import numpy as np
import pytest
from oracles import TinyPolicy, influence_by_repetition, repeat_rows

from dentropy.estimators import curvature, importance

POLICY = TinyPolicy()
COLUMNS = POLICY.columns()
per_both = pytest.mark.parametrize("per", ["token", "sequence"])


def one_table(seed=0, n_groups=16, per_group=4, eta=0.0):
    rng = np.random.default_rng(seed)
    (prompt,), (sequence,) = POLICY.sample(rng, 1, n_groups=n_groups, per_group=per_group)
    return POLICY.table(prompt, sequence, COLUMNS if eta == 0 else POLICY.columns(eta), per_group=per_group)


@per_both
@pytest.mark.parametrize("seed", [0, 1])
def test_is_the_second_difference_of_the_measurement(per, seed):
    base = one_table(seed)
    step = 1e-3
    delta = {k: importance(base, one_table(seed, eta=k * step), per=per).delta for k in (-2, -1, 1, 2)}
    second = (16 * (delta[1] + delta[-1]) - (delta[2] + delta[-2])) / (12 * step**2)
    assert curvature(base, per=per).value == pytest.approx(second, rel=1e-6)


@per_both
def test_a_large_batch_gives_the_true_curvature(per):
    estimate = curvature(one_table(2, n_groups=50_000), per=per)
    assert abs(estimate.value - POLICY.truth(0.0, per)[2]) < 4 * estimate.stderr
    assert abs(estimate.value) > 20 * estimate.stderr


@per_both
def test_influence_is_the_derivative_with_respect_to_a_rollout_s_weight(per):
    sums = one_table(3, n_groups=6, per_group=2)
    estimate = curvature(sums, per=per)
    numeric = influence_by_repetition(lambda counts: curvature(repeat_rows(sums, counts), per=per).value, len(sums))
    np.testing.assert_allclose(estimate.influence, numeric, atol=1e-5 * np.abs(numeric).max())
    assert abs(estimate.influence.sum()) < 1e-14 * np.abs(estimate.influence).sum()


@per_both
def test_parts_and_contributions_add_up_and_the_direction_s_length_scales_out(per):
    sums = one_table(4)
    estimate = curvature(sums, per=per)
    scale = np.abs(estimate.contributions).sum()
    assert abs(estimate.contributions.sum() - estimate.value) < 1e-14 * scale
    assert abs(sum(estimate.parts.values()) - estimate.value) < 1e-14 * scale
    first = ("dlogp", "dentropy", "entropy_dlogp", "entropy_to_go", "length_to_go")
    scaled = dataclasses.replace(
        sums, d2logp=9 * sums.d2logp, d2entropy=9 * sums.d2entropy, **{name: 3 * getattr(sums, name) for name in first}
    )
    assert curvature(scaled, per=per).value == pytest.approx(9 * estimate.value, rel=1e-12)
    assert curvature(scaled, per=per).stderr == pytest.approx(9 * estimate.stderr, rel=1e-12)


def test_stderr_follows_prompts_and_groups():
    sums = one_table(5)
    assert curvature(sums, prompts="fixed").stderr != curvature(sums).stderr
    one_group = curvature(dataclasses.replace(sums, group=np.zeros(64, dtype=int)))
    assert one_group.stderr is None and "one group" in one_group.stderr_reason


def test_bad_input():
    sums = one_table()
    with pytest.raises(ValueError, match="sums.d2logp is None.*measure with order=2"):
        curvature(dataclasses.replace(sums, d2logp=None, d2entropy=None))
    with pytest.raises(ValueError, match="per is 'word'"):
        curvature(sums, per="word")
    with pytest.raises(ValueError, match="prompts is 'all'"):
        curvature(sums, prompts="all")
    infinite = np.where(np.arange(64) == 9, np.inf, sums.d2entropy)
    with pytest.raises(ValueError, match="sums.d2entropy is inf for rollout 9"):
        curvature(dataclasses.replace(sums, d2entropy=infinite))
