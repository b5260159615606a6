"""The measurement with prefix weights: its definition, its derivative, its diagnostics, its refusals."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from chains import ChainPolicy
from oracles import influence_by_repetition, repeat_rows, take
from tables import POLICY, in_one_group, one_batch, one_table, per_both, prompts_both, table_with_tokens

from dentropy.estimators import importance, importance_diagnostics, predict, prediction_error, slope
from dentropy.stats.tables import SequenceSums, TokenStats


def tables(seed=0, etas=(0.0, 0.2), n_groups=16, per_group=4):
    """The same rollouts at each η, with their tokens."""
    batch = one_batch(seed, n_groups, per_group)
    return tuple(table_with_tokens(*batch, eta, per_group) for eta in etas)


def prefix(base, moved, **how):
    return importance(base, moved, weights="prefix", **how)


def token_by_token(base, moved):
    """For each rollout the entropies at η and the weights w_{<j}, and w_{<T+1} behind them, in long double."""
    ends = np.concatenate([[0], np.cumsum(base.n_tokens).astype(int)])
    ratio = np.asarray(moved.tokens.logp, np.longdouble) - np.asarray(base.tokens.logp, np.longdouble)
    entropy = np.asarray(moved.tokens.entropy, np.longdouble)
    for start, stop in zip(ends[:-1], ends[1:]):
        weights = [np.exp(ratio[start:j].sum()) for j in range(start, stop + 1)]
        yield entropy[start:stop], np.array(weights)


@per_both
def test_is_the_definition(per):
    base, moved = tables()
    result = prefix(base, moved, per=per)
    size = base.n_tokens if per == "token" else np.ones(64)
    rows = list(token_by_token(base, moved))
    moved_entropy = np.array([(h * w[:-1]).sum() for h, w in rows])
    moved_size = np.array([w[:-1].sum() if per == "token" else 1 for _, w in rows])
    base_value, moved_value = base.entropy.sum() / size.sum(), moved_entropy.sum() / moved_size.sum()
    assert result.base_value == pytest.approx(float(base_value), rel=1e-14)
    assert result.moved_value == pytest.approx(float(moved_value), rel=1e-14)
    assert result.delta == pytest.approx(float(moved_value - base_value), rel=1e-12)
    assert abs(result.delta - importance(base, moved, per=per).delta) > 1e-3
    scale = np.abs(result.contributions).sum()
    assert abs(result.contributions.sum() - result.delta) < 1e-15 * scale
    contributions = (moved_entropy - base_value * moved_size) / moved_size.sum() - (
        base.entropy - base_value * size
    ) / size.sum()
    np.testing.assert_allclose(result.contributions, contributions.astype(float), atol=1e-15)
    # What the tails are looked at of are the terms of the two sums.
    weights = np.exp(result.log_weights)
    np.testing.assert_allclose(weights * result.moved_entropy, moved_entropy.astype(float), rtol=1e-13)
    np.testing.assert_allclose(weights * result.size, moved_size.astype(float), rtol=1e-13)


@per_both
def test_a_large_batch_gives_the_true_change(per):
    result = prefix(*tables(1, n_groups=20_000), per=per)
    truth = POLICY.truth(0.2, per)[0] - POLICY.truth(0.0, per)[0]
    assert abs(result.delta - truth) < 4 * result.stderr
    assert abs(result.delta) > 20 * result.stderr
    assert result.mean_weight == pytest.approx(1, abs=0.01)


@per_both
def test_the_derivative_is_the_causal_slope(per):
    """By a difference of the seventh order, whose error is rounding."""
    h = 0.004
    base, *moved = tables(3, (0.0, h, -h, 2 * h, -2 * h, 3 * h, -3 * h))
    at = [prefix(base, m, per=per) for m in moved]
    first, second, third = (at[k].delta - at[k + 1].delta for k in (0, 2, 4))
    causal = slope(base, per=per)
    scale = np.abs(causal.contributions).sum()
    assert abs((45 * first - 9 * second + third) / (60 * h) - causal.value) < 1e-12 * scale
    exact = slope(base, estimator="exact", per=per)
    assert abs(exact.value - causal.value) > 0.01 * scale
    # Rollout by rollout, but for the common denominator, whose part sums to 0.
    up, down = (prefix(base, m, per=per).contributions for m in tables(3, (1e-5, -1e-5)))
    size, dsize = (base.n_tokens, base.length_to_go) if per == "token" else (np.ones(64), np.zeros(64))
    centred = base.entropy - base.entropy.sum() / size.sum() * size
    derivative = causal.contributions - centred * dsize.sum() / size.sum() ** 2
    np.testing.assert_allclose((up - down) / 2e-5, derivative, atol=1e-8 * np.abs(derivative).max())


def test_the_error_of_a_prediction_is_smallest_beside_the_measurement_of_its_form():
    base, moved = tables(4, (0.0, 0.02))
    stderr = {
        (estimator, weights): prediction_error(
            predict(slope(base, estimator=estimator), 0.02), importance(base, moved, weights=weights)
        ).stderr
        for estimator in ("causal", "exact")
        for weights in ("prefix", "sequence")
    }
    matched = max(stderr["causal", "prefix"], stderr["exact", "sequence"])
    assert 4 * matched < min(stderr["causal", "sequence"], stderr["exact", "prefix"])


@per_both
def test_influence_and_jackknife_are_those_of_the_same_formula(per):
    base, moved = tables(2, n_groups=6, per_group=2)

    def value(counts):
        return prefix(repeat_rows(base, counts), repeat_rows(moved, counts), per=per).delta

    result = prefix(base, moved, per=per)
    # M_i, by which terms are multiplied and divided, depends on the batch; the value does not.
    numeric = influence_by_repetition(value, len(base), copies=300)
    np.testing.assert_allclose(result.influence, numeric, atol=5e-5 * np.abs(numeric).max())
    anew = [value((base.group != group).astype(int)) for group in range(6)]
    np.testing.assert_allclose(result.leave_one_out, anew, rtol=1e-10)


@per_both
@prompts_both
def test_no_move_is_no_change(per, prompts):
    base, _ = tables()
    result = prefix(base, base, per=per, prompts=prompts)
    assert abs(result.delta) < 1e-15 and result.stderr < 1e-15
    assert result.ess == pytest.approx(64, rel=1e-14) and result.mean_weight == pytest.approx(1, rel=1e-14)
    assert result.worst_ess_fraction == 1
    assert importance_diagnostics(result).verdict == "reliable"


def test_weights_and_worst_position():
    base, moved = tables(3, (0.0, 0.5))
    kept = np.argsort(base.n_tokens, kind="stable")[:43]  # three of the longest, which have less than 5% of the tokens
    base, moved = take(base, kept), take(moved, kept)
    result = prefix(base, moved)
    rows, lengths = list(token_by_token(base, moved)), base.n_tokens.astype(int)
    longest = lengths.max()
    have = np.array([(lengths > j).sum() for j in range(longest)])
    # Behind its end a rollout keeps its last weight.
    mean = [sum(have[j] * w[min(j, len(w) - 1)] for j in range(longest)) / have.sum() for _, w in rows]
    np.testing.assert_allclose(np.exp(result.log_weights), np.array(mean, float), rtol=1e-13)
    assert result.mean_weight == pytest.approx(float(np.mean(mean)), rel=1e-13)
    at = [np.array([w[j] for _, w in rows if len(w) > j + 1], float) for j in range(longest)]
    fractions = [w.sum() ** 2 / (w**2).sum() / len(w) for w in at]
    carried = have.cumsum() - have < 0.95 * have.sum()
    assert 1 < carried.sum() <= np.argmin(fractions)
    worst = int(np.argmin(np.where(carried, fractions, 2)))
    assert result.worst_position == worst + 1
    assert result.worst_ess_fraction == pytest.approx(fractions[worst], rel=1e-13)
    assert (result.weights, importance(base, moved).weights) == ("prefix", "sequence")
    assert importance(base, moved).worst_position is None


@per_both
def test_a_harmless_move_is_judged_by_the_tails_of_both_sums(per):
    base, moved = tables(5, n_groups=64)
    diagnostics = importance_diagnostics(prefix(base, moved, per=per))
    assert diagnostics.verdict == "reliable" and diagnostics.khat_reason is None
    assert diagnostics.khat is not None and diagnostics.khat_entropy is not None
    assert (diagnostics.khat_tokens is None) == (per == "sequence")
    assert abs(diagnostics.smoothed_delta - prefix(base, moved, per=per).delta) < prefix(base, moved, per=per).stderr


def test_a_position_that_rests_on_few_rollouts_strains_the_verdict():
    """One token in twenty, at the end of rollouts, whose weights are one rollout's alone."""
    n, length = 400, 20
    entropy = torch.ones(n * length, dtype=torch.float64)
    logp = torch.zeros(n, length, dtype=torch.float64)
    table = dict(n_tokens=np.full(n, length), entropy=np.full(n, length), group=np.arange(n), rollout=np.arange(n))

    def scored(logp):
        tokens = TokenStats(logp.reshape(-1), entropy)
        return SequenceSums(**table, logp=logp.sum(1).numpy(), tokens=tokens)

    moved = logp.clone()
    moved[:, 17] = -8.0
    moved[0, 17] = 5.0
    diagnostics = importance_diagnostics(prefix(scored(logp), scored(moved)))
    assert diagnostics.verdict == "strained"
    assert "the ESS at token position 19 is" in diagnostics.reason


def test_rollouts_of_a_chain_need_fewer_with_prefix_weights():
    policy, eta, n = ChainPolicy(), 0.05, 200
    rollouts = policy.sample(np.random.default_rng(0), 64 * n, 4)
    base, moved = rollouts.tables(0.0, n), rollouts.tables(eta, n)
    truth = policy.truth(eta)[0] - policy.truth()[0]
    spread = {}
    for weights in ("prefix", "sequence"):
        results = [importance(b, m, weights=weights) for b, m in zip(base, moved)]
        values = np.array([r.delta for r in results])
        spread[weights] = values.std()
        assert abs(values.mean() - truth) < 4 * spread[weights] / np.sqrt(n)
        assert np.mean([r.stderr for r in results]) == pytest.approx(spread[weights], rel=0.15)
    assert 1.3 * spread["prefix"] < spread["sequence"]


def test_rows_are_paired_by_rollout():
    base, moved = tables()
    order = np.random.default_rng(0).permutation(64)
    result, shuffled = prefix(base, moved), prefix(base, take(moved, order))
    assert shuffled.delta == result.delta
    np.testing.assert_array_equal(shuffled.contributions, result.contributions)
    both = prefix(take(base, order[::-1]), take(moved, order))
    np.testing.assert_allclose(both.contributions, result.contributions[order[::-1]], atol=1e-15)


@per_both
def test_empty_rollouts(per):
    base, moved = tables()

    def padded(sums):
        columns = {name: np.append(0, values) for name, values in sums.columns().items()}
        return SequenceSums(
            **columns | {"rollout": np.arange(65), "group": np.append(99, sums.group)}, tokens=sums.tokens
        )

    result, plain = prefix(padded(base), padded(moved), per=per), prefix(base, moved, per=per)
    assert np.exp(result.log_weights[0]) == 1
    if per == "token":
        assert result.delta == pytest.approx(plain.delta, rel=1e-12) and result.contributions[0] == 0
    else:
        assert result.delta == pytest.approx(plain.delta * 64 / 65, rel=1e-12)


def test_one_rollout_and_one_group():
    base, moved = tables()
    one = prefix(take(base, [7]), take(moved, [7]))
    h, weights = list(token_by_token(base, moved))[7]
    want = (h * weights[:-1]).sum() / weights[:-1].sum() - base.entropy[7] / base.n_tokens[7]
    assert one.delta == pytest.approx(float(want), rel=1e-12)
    assert one.stderr is None and "the only rollout" in one.stderr_reason
    assert prefix(in_one_group(base), in_one_group(moved), prompts="fixed").stderr > 0


def test_far_moves():
    base, moved = tables()

    def by(nats):
        tokens = moved.tokens._replace(logp=moved.tokens.logp + nats / 5)
        return dataclasses.replace(moved, tokens=tokens, logp=moved.logp + nats / 5 * moved.n_tokens)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for nats in (-5000, 290, 3000):
            far = by(nats)
            weighted = [(w[:-1], h) for h, w in token_by_token(base, far)]
            moved_value = sum((w * h).sum() for w, h in weighted) / sum(w.sum() for w, _ in weighted)
            assert prefix(base, far).moved_value == pytest.approx(float(moved_value), rel=1e-11)
        assert np.isfinite([prefix(base, by(nats), per="sequence").delta for nats in (-5000, 290)]).all()
        with pytest.raises(ValueError, match="moved.tokens.logp: log-weights of rollout .* reach 3.. nats, expected"):
            prefix(base, by(400), per="sequence")
    assert importance_diagnostics(prefix(base, by(-5000))).verdict != "reliable"


def test_bad_input():
    base, moved = tables()
    with pytest.raises(ValueError, match="base.tokens: None, expected those of a table measured with keep_tokens=True"):
        prefix(one_table(), moved)
    with pytest.raises(ValueError, match="moved.tokens: None"):
        prefix(base, one_table(eta=0.2))
    fewer = dataclasses.replace(moved, tokens=TokenStats(moved.tokens.logp[1:], moved.tokens.entropy[1:]))
    with pytest.raises(ValueError, match=r"moved.tokens.entropy: shape \(\d+,\), expected \(\d+,\) by n_tokens"):
        prefix(base, fewer)
    broken = moved.tokens._replace(
        logp=torch.where(torch.arange(len(moved.tokens.logp)) == 5, torch.nan, moved.tokens.logp)
    )
    with pytest.raises(ValueError, match="moved.tokens.logp: nan at token 5"):
        prefix(base, dataclasses.replace(moved, tokens=broken))
    with pytest.raises(ValueError, match="weights: 'token', expected one of 'sequence', 'prefix'"):
        importance(base, moved, weights="token")
