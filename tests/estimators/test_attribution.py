"""Token contributions against the definition, token by token, and what they must add up to."""

import dataclasses

import numpy as np
import pytest
import torch
from oracles import influence_by_repetition
from tables import POLICY, estimator_all, one_batch, one_table, per_both, table_with_tokens

from dentropy.estimators import by_label, by_lag, by_length, by_position, clustered_stderr, slope, token_attribution
from dentropy.stats.plain import sequence_sums, token_stats
from dentropy.stats.tables import SequenceSums, TokenStats


def long_table(lengths, dtype=torch.float32, seed=0):
    """Rollouts of the given lengths, from random logits as a model gives them."""
    seeded, ends = torch.Generator().manual_seed(seed), np.append(0, np.cumsum(lengths))
    logits, dlogits = 2 * torch.randn(2, int(ends[-1]), 7, generator=seeded, dtype=dtype)
    targets = torch.randint(7, (int(ends[-1]),), generator=seeded)
    stats = token_stats(logits, targets, dlogits)
    return dataclasses.replace(sequence_sums(stats, torch.from_numpy(ends)), tokens=stats)


def check_sums(found, estimate, sums):
    """To 1e-12 of the sum of magnitudes, whole and rollout by rollout."""
    assert found.dtype == np.float64 and found.shape == (int(sums.n_tokens.sum()),)
    scale = np.abs(found).sum()
    assert abs(found.sum() - estimate.value) < 1e-12 * scale
    row = np.repeat(np.arange(len(sums)), sums.n_tokens.astype(int))
    per_rollout = np.bincount(row, weights=found, minlength=len(sums))
    np.testing.assert_allclose(per_rollout, estimate.contributions, rtol=0, atol=1e-12 * scale)


@per_both
@estimator_all
def test_is_the_definition_token_by_token(estimator, per):
    sums = table_with_tokens(*one_batch())
    found = token_attribution(sums, estimator=estimator, per=per)
    h, dlogp, dentropy = (np.asarray(sums.tokens._asdict()[n]) for n in ("entropy", "dlogp", "dentropy"))
    size = sums.n_tokens if per == "token" else np.ones(len(sums))
    mean, at = h.sum() / size.sum(), 0
    for i, T in enumerate(sums.n_tokens.astype(int)):
        for k in range(T):
            later = h[at + k + 1 : at + T]
            a = {
                "causal": sum(later - (mean if per == "token" else 0)),
                "exact": h[at : at + T].sum() - mean * size[i],
                "mixed": later.sum() - mean * size[i],
            }[estimator]
            expected = (dentropy[at + k] + dlogp[at + k] * a) / size.sum()
            assert found[at + k] == pytest.approx(expected, rel=1e-11, abs=1e-14)
        at += T
    check_sums(found, slope(sums, estimator=estimator, per=per), sums)


@per_both
@estimator_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_to_the_slope_on_long_rollouts(dtype, estimator, per):
    lengths = np.random.default_rng(1).integers(0, 3000, 40)
    lengths[[0, 7, 39]] = 0
    sums = long_table(lengths, dtype)
    check_sums(token_attribution(sums, estimator=estimator, per=per), slope(sums, estimator=estimator, per=per), sums)


def test_positions():
    lengths = np.array([1, 0, 5, 9, 3])
    sums = long_table(lengths, torch.float64)
    values = token_attribution(sums)
    bins = by_position(sums)
    position = np.concatenate([np.arange(1, T + 1) for T in lengths])
    assert list(zip(bins.first, bins.last, strict=True)) == [(1, 1), (2, 3), (4, 7), (8, 9)]
    for first, last, count, contribution in zip(bins.first, bins.last, bins.count, bins.contribution, strict=True):
        inside = (first <= position) & (position <= last)
        assert count == inside.sum() and contribution == pytest.approx(values[inside].sum(), rel=1e-12)
    assert bins.count.sum() == lengths.sum()


@pytest.mark.parametrize(
    "lengths", [np.random.default_rng(2).integers(1, 60, 200), np.full(30, 7), np.array([4]), np.array([0, 0, 2, 0, 9])]
)
def test_lengths(lengths):
    sums = long_table(lengths, torch.float64)
    contributions = slope(sums, estimator="exact").contributions
    bins = by_length(sums)
    assert 1 <= len(bins.first) <= 10 and bins.count.sum() == len(lengths) and bins.count.min() > 0
    assert bins.first[0] == lengths.min() and bins.last[-1] == lengths.max()
    assert np.all(bins.first <= bins.last) and np.all(bins.first[1:] > bins.last[:-1])
    for first, last, count, contribution in zip(bins.first, bins.last, bins.count, bins.contribution, strict=True):
        inside = (first <= lengths) & (lengths <= last)
        assert first in lengths and last in lengths and count == inside.sum()
        assert contribution == pytest.approx(contributions[inside].sum(), rel=1e-12, abs=1e-15)


def test_length_bins_hold_about_as_many_rollouts_each():
    lengths = np.random.default_rng(3).permutation(1000) + 1
    assert by_length(long_table(lengths, torch.float32)).count.tolist() == [100] * 10


@per_both
@estimator_all
def test_bins_sum_to_the_slope(estimator, per):
    sums = long_table(np.random.default_rng(4).integers(0, 300, 100))
    estimate = slope(sums, estimator=estimator, per=per)
    tokens = token_attribution(sums, estimator=estimator, per=per)
    labels = np.random.default_rng(5).integers(-3, 3, tokens.size)
    found = [by_position(sums, estimator=estimator, per=per), by_label(labels, sums, estimator=estimator, per=per)]
    found += {"causal": [by_lag(sums, per=per)], "exact": [by_length(sums, per=per)], "mixed": []}[estimator]
    for bins in found:
        assert abs(bins.contribution.sum() - estimate.value) < 1e-12 * np.abs(tokens).sum()
    assert found[1].first.tolist() == found[1].last.tolist() == [-3, -2, -1, 0, 1, 2]
    np.testing.assert_allclose(found[1].contribution[3], tokens[labels == 0].sum(), rtol=1e-9)


@per_both
def test_lags_are_the_definition_pair_by_pair(per):
    sums = table_with_tokens(*one_batch())
    h, dlogp, dentropy = (np.asarray(sums.tokens._asdict()[n]) for n in ("entropy", "dlogp", "dentropy"))
    size = sums.n_tokens if per == "token" else np.ones(len(sums))
    mean = h.sum() / size.sum() if per == "token" else 0.0
    expected, pairs, start = np.zeros(5), np.zeros(5, int), 0
    for T in sums.n_tokens.astype(int):
        for k in range(T):
            expected[0] += dentropy[start + k]
            pairs[0] += 1
            for lag in range(1, T - k):
                expected[lag] += dlogp[start + k] * (h[start + k + lag] - mean)
                pairs[lag] += 1
        start += T
    bins, bounds = by_lag(sums, per=per), [(0, 0), (1, 1), (2, 3), (4, 4)]
    assert list(zip(bins.first.tolist(), bins.last.tolist(), strict=True)) == bounds
    for b, (first, last) in enumerate(bounds):
        inside = slice(first, last + 1)
        assert bins.contribution[b] == pytest.approx(expected[inside].sum() / size.sum(), rel=1e-10)
        assert bins.count[b] == pairs[inside].sum()
    assert by_lag(long_table(np.array([1, 0, 1]))).contribution.shape == (1,)


def bins_of(sums, estimator, per):
    found = {"position": by_position(sums, estimator=estimator, per=per)}
    found |= {"causal": {"lag": by_lag(sums, per=per)}, "exact": {"length": by_length(sums, per=per)}}[estimator]
    return found


@per_both
@pytest.mark.parametrize("estimator", ["causal", "exact"])
def test_standard_errors_are_those_of_the_contributions_with_rollouts_weighted(estimator, per):
    """ψ_ib by repeating rows, and with it the clustered standard error of every bin."""
    prompt, sequence = one_batch(7, n_groups=5, per_group=3)
    found, group = bins_of(table_with_tokens(prompt, sequence), estimator, per), np.arange(15) // 3

    def value(counts, name, b):
        rows = np.repeat(np.arange(15), counts)
        return bins_of(table_with_tokens(prompt[rows], sequence[rows]), estimator, per)[name].contribution[b]

    for name, bins in found.items():
        b = len(bins.first) // 2
        psi = influence_by_repetition(lambda counts, n=name, b=b: value(counts, n, b), 15, copies=100)
        expected, _ = clustered_stderr(psi, group)
        table = dataclasses.replace(table_with_tokens(prompt, sequence), group=group)
        assert bins_of(table, estimator, per)[name].stderr[b] == pytest.approx(expected, rel=1e-3), name
    alone = dataclasses.replace(table_with_tokens(prompt, sequence), group=np.zeros(15, int))
    assert all(bins.stderr is None for bins in bins_of(alone, estimator, per).values())


def test_by_length_is_what_each_length_does_to_the_entropy():
    """d/dη of E[(H − H̄ T) 1(T = t)] / E[T], by enumeration: the causal contributions are another matter."""

    def parts(eta):
        columns = POLICY.columns(eta)
        centred = np.exp(columns["logp"]) * (columns["entropy"] - mean * columns["n_tokens"])
        return np.array([centred[columns["n_tokens"] == t].sum() for t in range(1, 6)]) / total

    columns = POLICY.columns()
    probability = np.exp(columns["logp"])
    total = (probability * columns["n_tokens"]).sum()
    mean = (probability * columns["entropy"]).sum() / total
    truth = (parts(1e-4) - parts(-1e-4)) / 2e-4
    sums = one_table(seed=8, n_groups=20_000)
    bins, causal = by_length(sums), slope(sums).contributions
    assert bins.first.tolist() == bins.last.tolist() == [1, 2, 3, 4, 5]
    assert np.all(np.abs(bins.contribution - truth) < 4 * bins.stderr)
    by_causal = np.array([causal[sums.n_tokens == t].sum() for t in range(1, 6)])
    assert np.any(np.abs(by_causal - truth) > 5 * bins.stderr)


def test_bad_input():
    sums = table_with_tokens(*one_batch())
    n = int(sums.n_tokens.sum())
    with pytest.raises(ValueError, match="sums.tokens: None, expected .*keep_tokens=True"):
        token_attribution(dataclasses.replace(sums, tokens=None))
    plain = sums.tokens._replace(dlogp=None, dentropy=None)
    with pytest.raises(ValueError, match="sums.tokens.dlogp: None, expected those of a pass with a direction"):
        token_attribution(dataclasses.replace(sums, tokens=plain))
    short = TokenStats(*(t[1:] if t is not None else None for t in sums.tokens))
    with pytest.raises(ValueError, match=rf"sums.tokens.entropy: shape \({n - 1},\), expected \({n},\)"):
        token_attribution(dataclasses.replace(sums, tokens=short))
    broken = sums.tokens._replace(dlogp=torch.where(torch.arange(n) == 5, torch.nan, sums.tokens.dlogp))
    with pytest.raises(ValueError, match="sums.tokens.dlogp: nan at token 5"):
        token_attribution(dataclasses.replace(sums, tokens=broken))
    with pytest.raises(ValueError, match="estimator: 'best'"):
        token_attribution(sums, estimator="best")
    with pytest.raises(ValueError, match="per: 'word'"):
        token_attribution(sums, per="word")
    with pytest.raises(ValueError, match=rf"labels: shape \(64,\), expected \({n},\): one val"):
        by_label(np.zeros(64), sums)
    for bins in (by_position, by_length, by_lag):
        with pytest.raises(ValueError, match="prompts: 'drawn'"):
            bins(sums, prompts="drawn")
    empty = SequenceSums(**{name: c[:0] for name, c in sums.columns().items()}, tokens=sums.tokens)
    with pytest.raises(ValueError, match="sums: no rows"):
        token_attribution(empty)
