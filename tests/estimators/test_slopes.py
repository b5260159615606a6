"""The slope against enumeration, finite differences of the measurement and its own definition."""

import dataclasses

import numpy as np
import pytest
import torch
from oracles import influence_by_repetition, repeat_rows
from tables import (
    ESTIMATORS,
    FIRST_ORDER,
    POLICY,
    columns,
    estimator_all,
    in_one_group,
    one_batch,
    one_table,
    per_both,
    table_with_tokens,
    take,
)

from dentropy.estimators import by_lag, clustered_stderr, importance, slope
from dentropy.stats.plain import sequence_sums, token_stats
from dentropy.stats.tables import SequenceSums


@per_both
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_the_oracle_s_jets_are_derivatives_of_its_enumerated_entropy(per, eta):
    step = 1e-3
    values = np.array([POLICY.truth(eta + k * step, per)[0] for k in (-2, -1, 0, 1, 2)])
    _, first, second = POLICY.truth(eta, per)
    assert first == pytest.approx(values @ [1, -8, 0, 8, -1] / (12 * step), rel=1e-7, abs=1e-9)
    assert second == pytest.approx(values @ [-1, 16, -30, 16, -1] / (12 * step**2), rel=1e-6)


def test_the_oracle_s_sampler_follows_the_enumerated_probabilities():
    prompt, sequence = POLICY.sample(np.random.default_rng(1), 1, n_groups=1, per_group=200_000)
    probability = np.exp(columns()["logp"][prompt[0, 0]])
    assert probability.sum() == pytest.approx(1, abs=1e-12)
    counts = np.bincount(sequence[0], minlength=probability.size)
    chi2 = np.sum((counts - counts.sum() * probability) ** 2 / (counts.sum() * probability))
    degrees = probability.size - 1
    assert abs(chi2 - degrees) < 4 * np.sqrt(2 * degrees)


def test_the_oracle_s_columns_are_those_of_the_token_statistics():
    prompt, sequence = one_batch(1)
    packed = {name: torch.from_numpy(values) for name, values in POLICY.packed(prompt, sequence, 0.3).items()}
    cu_seqlens = packed.pop("cu_seqlens")
    found = sequence_sums(token_stats(**packed), cu_seqlens).columns()
    for name, expected in one_table(1, eta=0.3).columns().items():
        if name != "group":
            np.testing.assert_allclose(found[name], expected, rtol=1e-11, atol=1e-12, err_msg=name)


@per_both
@estimator_all
def test_a_large_batch_gives_the_true_slope(estimator, per):
    estimate = slope(one_table(seed=2, n_groups=50_000), estimator=estimator, per=per)
    assert abs(estimate.value - POLICY.truth(0.0, per)[1]) < 4 * estimate.stderr
    # The bar is sharp enough to tell the corrected slope from the uncorrected one.
    if per == "token":
        assert abs(estimate.parts["uncorrected"] - estimate.value) > 20 * estimate.stderr


@per_both
def test_exact_is_the_central_difference_of_the_measurement(per):
    base = one_table()
    step = 2e-3
    delta = {k: importance(base, one_table(eta=k * step), per=per).delta for k in (-2, -1, 1, 2)}
    difference = (8 * (delta[1] - delta[-1]) - (delta[2] - delta[-2])) / (12 * step)
    assert slope(base, estimator="exact", per=per).value == pytest.approx(difference, rel=1e-8)


@per_both
@estimator_all
def test_value_is_the_definition_token_by_token(estimator, per):
    prompt, sequence = one_batch(3)
    logp, entropy = (jets[:, prompt, sequence] for jets in POLICY.token_jets(0.0))
    lengths = POLICY.lengths[sequence]
    size = lengths if per == "token" else np.ones(lengths.size)
    mean = entropy[0].sum() / size.sum()
    terms = entropy[1].sum(-1)
    for i, T in enumerate(lengths):
        h, dlogp = entropy[0, i, :T], logp[1, i, :T]
        if estimator == "causal":
            centre = mean if per == "token" else 0.0
            terms[i] += sum(dlogp[k] * sum(h[j] - centre for j in range(k + 1, T)) for k in range(T))
        elif estimator == "exact":
            terms[i] += (h.sum() - mean * size[i]) * dlogp.sum()
        else:
            terms[i] += sum(h[k + 1 :].sum() * dlogp[k] for k in range(T)) - mean * size[i] * dlogp.sum()
    estimate = slope(one_table(3), estimator=estimator, per=per)
    np.testing.assert_allclose(estimate.contributions, terms / size.sum(), rtol=1e-12, atol=1e-15)
    assert estimate.value == pytest.approx(terms.sum() / size.sum(), rel=1e-12)


@per_both
@estimator_all
def test_parts_and_contributions_add_up(estimator, per):
    estimate = slope(one_table(4), estimator=estimator, per=per)
    parts = estimate.parts
    scale = np.abs(estimate.contributions).sum()
    assert abs(estimate.contributions.sum() - estimate.value) < 1e-14 * scale
    total = parts["pathwise"] + parts["score"] + parts["length_correction"]
    assert abs(total - estimate.value) < 1e-14 * scale
    assert (estimate.name, estimate.estimator, estimate.per) == ("slope", estimator, per)


@per_both
@estimator_all
def test_other_answers_are_the_sum_of_score_and_length_correction(estimator, per):
    parts = slope(one_table(4), estimator=estimator, per=per).parts
    assert parts["other_answers"] == pytest.approx(parts["score"] + parts["length_correction"], rel=1e-12)


@per_both
@estimator_all
def test_errors_of_the_parts_come_from_their_derivatives_with_respect_to_a_rollout_s_weight(estimator, per):
    sums = one_table(7, n_groups=6, per_group=2)
    found = slope(sums, estimator=estimator, per=per)
    assert found.part_stderrs.keys() == found.parts.keys()
    for name, stderr in found.part_stderrs.items():
        psi = influence_by_repetition(
            lambda counts, n=name: slope(repeat_rows(sums, counts), estimator=estimator, per=per).parts[n], len(sums)
        )
        assert stderr == pytest.approx(clustered_stderr(psi, sums.group)[0], rel=1e-4), name
    assert set(slope(in_one_group(sums)).part_stderrs.values()) == {None}


@per_both
@pytest.mark.parametrize("horizon", [0, 1, 3, 100])
def test_a_horizon_keeps_later_tokens_within_it(horizon, per):
    prompt, sequence = one_batch(3)
    sums, full = table_with_tokens(prompt, sequence), slope(one_table(3), per=per)
    estimate = slope(sums, per=per, horizon=horizon)
    logp, entropy = (jets[:, prompt, sequence] for jets in POLICY.token_jets(0.0))
    size = sums.n_tokens if per == "token" else np.ones(64)
    mean = entropy[0].sum() / size.sum() if per == "token" else 0.0
    terms = entropy[1].sum(-1)
    for i, T in enumerate(POLICY.lengths[sequence]):
        h, dlogp = entropy[0, i], logp[1, i]
        terms[i] += sum(dlogp[k] * sum(h[j] - mean for j in range(k + 1, min(T, k + 1 + horizon))) for k in range(T))
    np.testing.assert_allclose(estimate.contributions, terms / size.sum(), rtol=1e-10, atol=1e-15)
    assert estimate.value + estimate.parts["left_out"] == pytest.approx(full.value, rel=1e-10)
    beyond = by_lag(sums, per=per)
    if horizon in (1, 3):
        assert estimate.parts["left_out"] == pytest.approx(beyond.contribution[beyond.first > horizon].sum(), rel=1e-9)
    if horizon == 100:
        assert estimate.part_stderrs["left_out"] == pytest.approx(0, abs=1e-12)
        np.testing.assert_allclose(estimate.influence, full.influence, atol=1e-14)


@pytest.mark.parametrize("baseline", ["none", "entropy"])
def test_uncorrected_is_mixed_without_its_last_term(baseline):
    sums = one_table(5)
    mixed = slope(sums, estimator="mixed", baseline=baseline)
    without = mixed.value - mixed.parts["length_correction"]
    assert mixed.parts["length_correction"] == pytest.approx(
        -sums.entropy.sum() / sums.n_tokens.sum() ** 2 * (sums.n_tokens * sums.dlogp).sum()
    )
    for estimator in ESTIMATORS:
        estimate = slope(sums, estimator=estimator, baseline=baseline)
        assert estimate.parts["uncorrected"] == pytest.approx(without, rel=1e-12)


@per_both
def test_baseline_arrays(per):
    sums = table_with_tokens(*one_batch(6))
    named = {name: slope(sums, estimator="mixed", per=per, baseline=name) for name in ("none", "entropy")}
    for name, array in (("none", np.zeros(len(sums.tokens.logp))), ("entropy", sums.tokens.entropy)):
        given = slope(sums, estimator="mixed", per=per, baseline=array)
        np.testing.assert_allclose(given.contributions, named[name].contributions, atol=1e-15)
        np.testing.assert_allclose(given.influence, named[name].influence, atol=1e-15)
    # A constant b takes b Σ ℓ' off the score.
    shifted = slope(sums, estimator="mixed", per=per, baseline=np.full(len(sums.tokens.logp), 0.7))
    size = sums.n_tokens.sum() if per == "token" else len(sums)
    assert shifted.value == pytest.approx(named["none"].value - 0.7 * sums.dlogp.sum() / size, rel=1e-12)


def test_baseline_array_skips_empty_rollouts():
    prompt, sequence = one_batch(6)
    full = table_with_tokens(prompt, sequence)
    baseline = np.linspace(0, 1, len(full.tokens.logp))
    empty = {name: np.insert(values, [0, 10, 64], 0) for name, values in full.columns().items()}
    padded = SequenceSums(**empty | {"rollout": np.arange(67)}, tokens=full.tokens)
    value = slope(full, estimator="mixed", baseline=baseline).value
    assert slope(padded, estimator="mixed", baseline=baseline).value == pytest.approx(value, rel=1e-12)


@per_both
@estimator_all
def test_influence_is_the_derivative_with_respect_to_a_rollout_s_weight(estimator, per):
    sums = one_table(7, n_groups=6, per_group=2)
    estimate = slope(sums, estimator=estimator, per=per)
    numeric = influence_by_repetition(
        lambda counts: slope(repeat_rows(sums, counts), estimator=estimator, per=per).value, len(sums)
    )
    np.testing.assert_allclose(estimate.influence, numeric, atol=1e-5 * np.abs(numeric).max())
    assert abs(estimate.influence.sum()) < 1e-14 * np.abs(estimate.influence).sum()


@estimator_all
def test_stderr_agrees_with_the_leave_one_group_out_jackknife(estimator):
    sums = one_table(8, n_groups=200)
    estimate = slope(sums, estimator=estimator)
    kept = [repeat_rows(sums, sums.group != left_out) for left_out in range(200)]
    left_out = np.array([slope(rest, estimator=estimator).value for rest in kept])
    jackknife = np.sqrt(199 / 200 * np.sum((left_out - left_out.mean()) ** 2))
    assert estimate.stderr == pytest.approx(jackknife, rel=0.03)


@estimator_all
def test_row_order_does_not_matter_and_the_direction_s_length_scales_out(estimator):
    sums = one_table(9)
    estimate = slope(sums, estimator=estimator)
    order = np.random.default_rng(0).permutation(len(sums))
    shuffled = slope(take(sums, order), estimator=estimator)
    assert shuffled.value == pytest.approx(estimate.value, rel=1e-12)
    assert shuffled.stderr == pytest.approx(estimate.stderr, rel=1e-12)
    scaled = dataclasses.replace(sums, **{name: 3 * getattr(sums, name) for name in FIRST_ORDER})
    assert slope(scaled, estimator=estimator).value == pytest.approx(3 * estimate.value, rel=1e-12)
    assert slope(scaled, estimator=estimator).stderr == pytest.approx(3 * estimate.stderr, rel=1e-12)


@estimator_all
def test_empty_rollouts_count_per_sequence_and_not_per_token(estimator):
    sums = one_table(10)
    longer = {name: np.append(values, [0, 0]) for name, values in sums.columns().items()}
    padded = SequenceSums(**longer | {"rollout": np.arange(66), "group": np.append(sums.group, [3, 99])})
    assert slope(padded, estimator=estimator).value == pytest.approx(slope(sums, estimator=estimator).value, rel=1e-12)
    if estimator == "causal":
        assert slope(padded, per="sequence").value == pytest.approx(
            slope(sums, per="sequence").value * 64 / 66, rel=1e-12
        )


@per_both
@estimator_all
def test_one_rollout_has_a_value_and_no_stderr(estimator, per):
    for row in (POLICY.sequences.index((0,)), POLICY.sequences.index((1, 2, 0))):
        estimate = slope(POLICY.table(np.array([3]), np.array([row]), columns()), estimator=estimator, per=per)
        assert np.isfinite(estimate.value) and estimate.stderr is None
        assert "two groups" in estimate.stderr_reason
        if estimator == "exact" and per == "token":  # its own mean entropy is H̄: the weights cancel
            pathwise = columns()["dentropy"][3, row] / POLICY.lengths[row]
            assert estimate.value == pytest.approx(pathwise, rel=1e-9)


def test_one_group_and_groups_of_one():
    sums = in_one_group(one_table(11))
    assert slope(sums).stderr is None and "one group" in slope(sums).stderr_reason
    assert slope(sums, prompts="fixed").stderr > 0
    alone = dataclasses.replace(sums, group=np.arange(64))
    assert slope(alone).stderr > 0 and slope(alone).stderr_reason is None
    assert "group 0 has one rollout" in slope(alone, prompts="fixed").stderr_reason


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"estimator": "best"}, "estimator: 'best', expected one of 'causal', 'exact', 'mixed'"),
        ({"per": "rollout"}, "per: 'rollout', expected one of 'token', 'sequence'"),
        ({"prompts": "mine"}, "prompts: 'mine', expected one of 'random', 'fixed'"),
        ({"baseline": "mean"}, "baseline: 'mean', expected one of 'none', 'entropy'"),
        ({"estimator": None}, "estimator: None, expected"),
        ({"horizon": -1}, "horizon: -1, expected a number of tokens"),
        ({"horizon": 2.0}, "horizon: 2.0, expected a number of tokens"),
        ({"horizon": 2, "estimator": "exact"}, "horizon: 2 with estimator='exact', expected the causal one"),
        ({"horizon": 2}, "sums.tokens: None, expected those of a table measured with keep_tokens=True"),
        ({"baseline": np.zeros(3)}, "baseline: an array for a table without tokens, expected .*keep_tokens=True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        slope(one_table(), **arguments)


def test_bad_baseline_arrays():
    sums = table_with_tokens(*one_batch())
    n = int(sums.n_tokens.sum())
    with pytest.raises(ValueError, match=rf"baseline: shape \({n - 1},\), expected \({n},\)"):
        slope(sums, baseline=np.zeros(n - 1))
    with pytest.raises(ValueError, match="baseline: nan at token 4"):
        slope(sums, baseline=np.where(np.arange(n) == 4, np.nan, 0.0))
