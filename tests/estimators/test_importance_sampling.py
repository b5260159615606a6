"""The importance-sampling measurement: its definition, its diagnostics, its refusals."""

import dataclasses
import warnings

import numpy as np
import pytest
from oracles import influence_by_repetition, repeat_rows
from tables import FIRST_ORDER, POLICY, SECOND_ORDER, in_one_group, one_table, per_both, take, with_value

from dentropy.estimators import importance, slope
from dentropy.stats.tables import SequenceSums


def pair(seed=0, n_groups=16, per_group=4):
    """The same rollouts at η = 0 and 0.2, without tangents."""
    return tuple(
        dataclasses.replace(one_table(seed, eta, n_groups, per_group), **dict.fromkeys(FIRST_ORDER + SECOND_ORDER))
        for eta in (0.0, 0.2)
    )


@per_both
def test_a_large_batch_gives_the_true_change(per):
    result = importance(*pair(1, n_groups=50_000), per=per)
    truth = POLICY.truth(0.2, per)[0] - POLICY.truth(0.0, per)[0]
    assert abs(result.delta - truth) < 4 * result.stderr
    assert abs(result.delta) > 20 * result.stderr
    assert result.mean_weight == pytest.approx(1, abs=0.01)


@per_both
def test_is_the_definition(per):
    base, moved = pair()
    result = importance(base, moved, per=per)
    w = np.exp((moved.logp - base.logp).astype(np.longdouble))
    size = base.n_tokens if per == "token" else np.ones(64)
    base_value, moved_value = base.entropy.sum() / size.sum(), (w * moved.entropy).sum() / (w * size).sum()
    assert result.base_value == pytest.approx(float(base_value), rel=1e-14)
    assert result.moved_value == pytest.approx(float(moved_value), rel=1e-14)
    assert result.delta == pytest.approx(float(moved_value - base_value), rel=1e-12)
    scale = np.abs(result.contributions).sum()
    assert abs(result.contributions.sum() - result.delta) < 1e-15 * scale
    assert abs(result.moved_value - result.base_value - result.delta) < 1e-14 * scale
    contributions = (
        w * (moved.entropy - base_value * size) / (w * size).sum() - (base.entropy - base_value * size) / size.sum()
    )
    np.testing.assert_allclose(result.contributions, contributions.astype(float), atol=1e-15)


def test_diagnostics():
    base, moved = pair()
    result = importance(base, moved)
    w = np.exp(moved.logp - base.logp)
    assert result.n == 64
    assert result.ess == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-12)
    assert result.ess_fraction == pytest.approx(result.ess / 64, rel=1e-15)
    wT = w * base.n_tokens
    assert result.ess_tokens == pytest.approx(wT.sum() ** 2 / (wT**2).sum(), rel=1e-12)
    assert result.max_weight == pytest.approx(w.max() / w.sum(), rel=1e-12)
    assert result.mean_weight == pytest.approx(w.mean(), rel=1e-12)
    np.testing.assert_allclose(result.log_weights, np.log(w), atol=1e-14)
    levels = dict(min=0, p05=5, p25=25, median=50, p75=75, p95=95, max=100)
    assert result.log_weight_quantiles == pytest.approx(
        {name: np.percentile(result.log_weights, level) for name, level in levels.items()}
    )


def test_no_move_is_no_change():
    base, _ = pair()
    result = importance(base, base)
    assert result.delta == 0 and result.stderr == 0
    assert result.ess == 64 and result.mean_weight == 1 and result.max_weight == 1 / 64


def test_ess_counts_the_rollouts_that_carry_weight():
    base, _ = pair()
    lift = np.where(np.arange(64) < 16, 30.0, -30.0)
    moved = dataclasses.replace(base, logp=base.logp + lift)
    assert importance(base, moved).ess == pytest.approx(16, rel=1e-12)


@per_both
def test_influence_is_the_derivative_with_respect_to_a_rollout_s_weight(per):
    base, moved = pair(2, n_groups=6, per_group=2)
    result = importance(base, moved, per=per)
    numeric = influence_by_repetition(
        lambda counts: importance(repeat_rows(base, counts), repeat_rows(moved, counts), per=per).delta, len(base)
    )
    np.testing.assert_allclose(result.influence, numeric, atol=1e-5 * np.abs(numeric).max())


@per_both
def test_contributions_linearize_to_those_of_the_exact_slope(per):
    base = one_table(3)
    linear = slope(base, estimator="exact", per=per).contributions
    assert np.corrcoef(importance(base, one_table(3, 0.01), per=per).contributions, linear)[0, 1] > 0.99
    # The common denominator Σ w T moves too: its part of the derivative sums to 0 over the rollouts.
    size = base.n_tokens if per == "token" else np.ones(64)
    centred = base.entropy - base.entropy.sum() / size.sum() * size
    derivative = linear - centred * (size * base.dlogp).sum() / size.sum() ** 2
    up, down = (importance(base, one_table(3, eta), per=per).contributions for eta in (1e-5, -1e-5))
    np.testing.assert_allclose((up - down) / 2e-5, derivative, atol=1e-8 * np.abs(linear).max())


@per_both
def test_large_weights_neither_overflow_nor_warn(per):
    base, moved = pair()
    far = dataclasses.replace(moved, logp=moved.logp + 2000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = importance(base, far, per=per)
    plain = importance(base, moved, per=per)
    assert result.mean_weight == np.inf
    assert result.delta == pytest.approx(plain.delta, rel=1e-10)
    assert result.stderr == pytest.approx(plain.stderr, rel=1e-10)
    assert result.ess == pytest.approx(plain.ess, rel=1e-10)


@per_both
def test_rows_are_paired_by_rollout(per):
    base, moved = pair()
    order = np.random.default_rng(0).permutation(64)
    result, shuffled = importance(base, moved, per=per), importance(base, take(moved, order), per=per)
    assert shuffled.delta == result.delta
    np.testing.assert_array_equal(shuffled.contributions, result.contributions)
    both = importance(take(base, order[::-1]), take(moved, order), per=per)
    np.testing.assert_allclose(both.contributions, result.contributions[order[::-1]], atol=1e-15)
    assert both.delta == pytest.approx(result.delta, rel=1e-12)


def test_empty_rollouts_add_nothing_per_token():
    base, moved = pair()

    def padded(sums):
        columns = {name: np.append(values, [0, 0]) for name, values in sums.columns().items()}
        return SequenceSums(**columns | {"rollout": np.arange(66), "group": np.append(sums.group, [3, 99])})

    result, plain = importance(padded(base), padded(moved)), importance(base, moved)
    assert result.delta == pytest.approx(plain.delta, rel=1e-12)
    assert result.contributions[-2:].tolist() == [0, 0]
    assert result.ess_tokens == pytest.approx(plain.ess_tokens, rel=1e-12)
    faint = dataclasses.replace(padded(moved), logp=np.append(moved.logp - 500.0, [0, 0]))
    assert importance(padded(base), faint).ess_tokens == pytest.approx(plain.ess_tokens, rel=1e-10)
    assert importance(padded(base), faint).delta == pytest.approx(plain.delta, rel=1e-10)
    lost = dataclasses.replace(padded(moved), logp=np.append(moved.logp - 2000.0, [0, 0]))
    with pytest.raises(ValueError, match="moved.logp: so far below base.logp"):
        importance(padded(base), lost)


def test_one_rollout_and_one_group():
    base, moved = pair()
    one = importance(take(base, [7]), take(moved, [7]))
    assert one.delta == pytest.approx((moved.entropy[7] - base.entropy[7]) / base.n_tokens[7], rel=1e-12)
    assert one.stderr is None and "the only rollout" in one.stderr_reason
    together = in_one_group(base), in_one_group(moved)
    assert importance(*together).stderr is None and "one group" in importance(*together).stderr_reason
    assert importance(*together, prompts="fixed").stderr > 0


def test_tables_of_other_rollouts():
    base, moved = pair()
    with pytest.raises(ValueError, match="moved: rollout 63 is missing"):
        importance(base, take(moved, np.arange(63)))
    with pytest.raises(ValueError, match="base: rollout 0 is missing"):
        importance(take(base, np.arange(1, 64)), moved)
    with pytest.raises(ValueError, match="base.rollout: 3 occurs more than once"):
        importance(take(base, [3, 3]), take(moved, [3, 4]))
    with pytest.raises(ValueError, match="moved.rollout: 4 occurs more than once"):
        importance(take(base, [3, 4]), take(moved, [4, 3, 4]))
    longer = dataclasses.replace(moved, n_tokens=moved.n_tokens + (np.arange(64) == 12))
    with pytest.raises(ValueError, match="moved.n_tokens: .* for rollout 12"):
        importance(base, longer)
    regrouped = dataclasses.replace(moved, group=np.where(np.arange(64) == 20, 99, moved.group))
    with pytest.raises(ValueError, match="moved.group: 99 for rollout 20, expected 5"):
        importance(base, regrouped)


def test_bad_values_and_choices():
    base, moved = pair()
    with pytest.raises(ValueError, match="moved.logp: -inf for rollout 8"):
        importance(base, with_value(moved, "logp", 8, -np.inf))
    with pytest.raises(ValueError, match="base.entropy: nan for rollout 2"):
        importance(with_value(base, "entropy", 2, np.nan), moved)
    with pytest.raises(ValueError, match="base: no rows"):
        importance(take(base, []), take(moved, []))
    zeros = np.zeros(64)
    with pytest.raises(ValueError, match="base.n_tokens: 0 for all 64"):
        importance(dataclasses.replace(base, n_tokens=zeros), dataclasses.replace(moved, n_tokens=zeros))
    with pytest.raises(ValueError, match="per: 'word'"):
        importance(base, moved, per="word")
    with pytest.raises(ValueError, match="prompts: 'all'"):
        importance(base, moved, prompts="all")
