"""The curvature against the second difference of the measurement and enumeration."""

import dataclasses

import numpy as np
import pytest
from chains import ChainPolicy
from oracles import influence_by_repetition, repeat_rows
from tables import (
    FIRST_ORDER,
    POLICY,
    SECOND_ORDER,
    in_one_group,
    one_batch,
    one_table,
    per_both,
    prompts_both,
    table_with_tokens,
    with_value,
)

from dentropy.estimators import clustered_stderr, curvature, importance, predict, slope, trust_range

estimator_both = pytest.mark.parametrize("estimator", ["exact", "causal"])
WEIGHTS = {"exact": "sequence", "causal": "prefix"}


@per_both
@estimator_both
@pytest.mark.parametrize("seed", [0, 1])
def test_is_the_second_difference_of_the_measurement(per, estimator, seed):
    batch = one_batch(seed)
    base = table_with_tokens(*batch)
    step = 1e-3
    delta = {
        k: importance(base, table_with_tokens(*batch, k * step), weights=WEIGHTS[estimator], per=per).delta
        for k in (-2, -1, 1, 2)
    }
    second = (16 * (delta[1] + delta[-1]) - (delta[2] + delta[-2])) / (12 * step**2)
    assert curvature(one_table(seed), estimator=estimator, per=per).value == pytest.approx(second, rel=1e-6)


@per_both
@estimator_both
def test_a_large_batch_gives_the_true_curvature(per, estimator):
    estimate = curvature(one_table(2, n_groups=50_000), estimator=estimator, per=per)
    assert abs(estimate.value - POLICY.truth(0.0, per)[2]) < 4 * estimate.stderr
    assert abs(estimate.value) > 20 * estimate.stderr


@per_both
@estimator_both
def test_the_jackknife_leaves_out_groups_of_the_same_formula(per, estimator):
    sums = one_table(3, n_groups=6, per_group=2)
    anew = [
        curvature(repeat_rows(sums, sums.group != left_out), estimator=estimator, per=per).value
        for left_out in range(6)
    ]
    np.testing.assert_allclose(curvature(sums, estimator=estimator, per=per).leave_one_out, anew, rtol=1e-10)


def test_the_causal_one_varies_less():
    """Over batches of rollouts of some 20 tokens, by as much as its standard errors say."""
    policy, n = ChainPolicy(), 200
    batches = policy.sample(np.random.default_rng(1), 64 * n, 4).tables(0.0, n, order=2)
    both = {e: [curvature(sums, estimator=e) for sums in batches] for e in WEIGHTS}
    spread = {e: np.std([c.value for c in estimates]) for e, estimates in both.items()}
    for estimator, estimates in both.items():
        error = np.mean([c.value for c in estimates]) - policy.truth()[2]
        assert abs(error) < 4 * spread[estimator] / np.sqrt(n) + 0.1 * spread[estimator]
        assert np.mean([c.stderr for c in estimates]) == pytest.approx(spread[estimator], rel=0.2)
    assert 1.7 * spread["causal"] < spread["exact"]


@per_both
@estimator_both
def test_influence_is_the_derivative_with_respect_to_a_rollout_s_weight(per, estimator):
    sums = one_table(3, n_groups=6, per_group=2)
    estimate = curvature(sums, estimator=estimator, per=per)
    numeric = influence_by_repetition(
        lambda counts: curvature(repeat_rows(sums, counts), estimator=estimator, per=per).value, len(sums)
    )
    np.testing.assert_allclose(estimate.influence, numeric, atol=1e-5 * np.abs(numeric).max())
    assert abs(estimate.influence.sum()) < 1e-14 * np.abs(estimate.influence).sum()


@per_both
@estimator_both
def test_errors_of_the_parts_come_from_their_derivatives_with_respect_to_a_rollout_s_weight(per, estimator):
    sums = one_table(3, n_groups=6, per_group=2)
    found = curvature(sums, estimator=estimator, per=per)
    assert found.part_stderrs.keys() == found.parts.keys()
    for name, stderr in found.part_stderrs.items():
        psi = influence_by_repetition(
            lambda counts, n=name: curvature(repeat_rows(sums, counts), estimator=estimator, per=per).parts[n],
            len(sums),
        )
        assert stderr == pytest.approx(clustered_stderr(psi, sums.group)[0], rel=1e-4), name


@per_both
@estimator_both
def test_parts_and_contributions_add_up_and_the_direction_s_length_scales_out(per, estimator):
    sums = one_table(4)
    estimate = curvature(sums, estimator=estimator, per=per)
    assert (estimate.name, estimate.estimator) == ("curvature", estimator)
    scale = np.abs(estimate.contributions).sum()
    assert abs(estimate.contributions.sum() - estimate.value) < 1e-14 * scale
    assert abs(sum(estimate.parts.values()) - estimate.value) < 1e-14 * scale
    factors = dict.fromkeys(FIRST_ORDER, 3) | dict.fromkeys(SECOND_ORDER, 9)
    scaled = dataclasses.replace(sums, **{name: c * getattr(sums, name) for name, c in factors.items()})
    scaled = curvature(scaled, estimator=estimator, per=per)
    assert scaled.value == pytest.approx(9 * estimate.value, rel=1e-12)
    assert scaled.stderr == pytest.approx(9 * estimate.stderr, rel=1e-12)


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


@per_both
def test_a_causal_slope_that_is_there_is_used_by_the_causal_curvature(per):
    sums = one_table(6)
    first = slope(sums, per=per)
    found, anew = (curvature(sums, estimator="causal", per=per, first=given) for given in (first, None))
    assert (found.value, found.stderr) == (anew.value, anew.stderr)
    assert predict(first, 0.1, found).value == pytest.approx(0.1 * first.value + 0.005 * found.value, rel=1e-12)
    assert trust_range(first, found).eta_star == 2 * abs(first.value / found.value)
    # R' enters as it is given: −2 ΔR' ΣΣ_j A_j / D, and not at all per sequence
    by = 2 * sums.length_to_go.sum() / sums.n_tokens.sum() if per == "token" else 0.0
    shifted = curvature(sums, estimator="causal", per=per, first=dataclasses.replace(first, value=first.value + 1))
    assert shifted.value - anew.value == pytest.approx(-by, rel=1e-9)


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
    with pytest.raises(ValueError, match="first: the exact slope, expected the causal one"):
        curvature(sums, estimator="causal", first=slope(sums, estimator="exact"))


def test_bad_input():
    sums = one_table()
    with pytest.raises(ValueError, match="sums.d2logp: None, expected .* order=2"):
        curvature(dataclasses.replace(sums, d2logp=None, d2entropy=None))
    old = dataclasses.replace(sums, dentropy_to_go=None, entropy_to_go_2=None, length_to_go_2=None)
    assert curvature(old).value == curvature(sums).value
    with pytest.raises(ValueError, match="sums.length_to_go_2: None, expected .* order=2 .* by a version that has it"):
        curvature(old, estimator="causal")
    with pytest.raises(ValueError, match="sums.entropy_to_go_2: nan for rollout 9"):
        curvature(with_value(sums, "entropy_to_go_2", 9, np.nan), estimator="causal")
    with pytest.raises(ValueError, match="estimator: 'mixed', expected one of 'exact', 'causal'"):
        curvature(sums, estimator="mixed")
    with pytest.raises(ValueError, match="per: 'word'"):
        curvature(sums, per="word")
    with pytest.raises(ValueError, match="prompts: 'all'"):
        curvature(sums, prompts="all")
    with pytest.raises(ValueError, match="sums.d2entropy: inf for rollout 9"):
        curvature(with_value(sums, "d2entropy", 9, np.inf))
