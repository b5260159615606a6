"""The curvature against the second difference of the measurement and enumeration."""

import dataclasses

import numpy as np
import pytest
from oracles import influence_by_repetition, repeat_rows
from tables import FIRST_ORDER, POLICY, SECOND_ORDER, in_one_group, one_table, per_both, prompts_both, with_value

from dentropy.estimators import curvature, importance, slope


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
    factors = dict.fromkeys(FIRST_ORDER, 3) | dict.fromkeys(SECOND_ORDER, 9)
    scaled = dataclasses.replace(sums, **{name: c * getattr(sums, name) for name, c in factors.items()})
    assert curvature(scaled, per=per).value == pytest.approx(9 * estimate.value, rel=1e-12)
    assert curvature(scaled, per=per).stderr == pytest.approx(9 * estimate.stderr, rel=1e-12)


def test_stderr_follows_prompts_and_groups():
    sums = one_table(5)
    assert curvature(sums, prompts="fixed").stderr != curvature(sums).stderr
    one_group = curvature(in_one_group(sums))
    assert one_group.stderr is None and "one group" in one_group.stderr_reason


@per_both
@prompts_both
def test_an_exact_slope_that_is_there_is_used(prompts, per):
    sums, how = one_table(6), {"per": per, "prompts": prompts}
    first = slope(sums, estimator="exact", **how)
    found, anew = curvature(sums, **how, first=first), curvature(sums, **how)
    assert (found.value, found.stderr) == (anew.value, anew.stderr)
    # R' enters as it is given: −2 ΔR' Σ T ℓ' / D
    size = sums.n_tokens if per == "token" else np.ones(64)
    shifted = curvature(sums, **how, first=dataclasses.replace(first, value=first.value + 1)).value - anew.value
    assert shifted == pytest.approx(-2 * (size * sums.dlogp).sum() / size.sum(), rel=1e-9)


def test_a_slope_of_something_else_is_refused():
    sums = one_table()
    for first, message in (
        (slope(sums), "first: the causal slope, expected the exact one"),
        (curvature(sums), "first: a curvature, expected a slope"),
        (slope(sums, estimator="exact", per="sequence"), "first: per='sequence', expected 'token'"),
        (slope(sums, estimator="exact", prompts="fixed"), "first: prompts='fixed', expected 'random'"),
        (slope(one_table(n_groups=17), estimator="exact"), "first: of other rollouts"),
    ):
        with pytest.raises(ValueError, match=message):
            curvature(sums, first=first)


def test_bad_input():
    sums = one_table()
    with pytest.raises(ValueError, match="sums.d2logp: None, expected .* order=2"):
        curvature(dataclasses.replace(sums, d2logp=None, d2entropy=None))
    with pytest.raises(ValueError, match="per: 'word'"):
        curvature(sums, per="word")
    with pytest.raises(ValueError, match="prompts: 'all'"):
        curvature(sums, prompts="all")
    with pytest.raises(ValueError, match="sums.d2entropy: inf for rollout 9"):
        curvature(with_value(sums, "d2entropy", 9, np.inf))
