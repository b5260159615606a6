"""Proxies where they are exact, and their grades against scipy and against noise that was put in."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from dentropy.estimators import grade_proxy, update_proxies
from dentropy.estimators.proxies import RESAMPLES, SEED

RNG = np.random.default_rng(3)
SMALL = 1e-5


def entropy(z):
    p = np.exp(z - z.max())
    p /= p.sum()
    return -(p * np.log(p)).sum(), p


def moved(z, by):
    """d entropy along `by`, by central differences."""
    return (entropy(z + SMALL * by)[0] - entropy(z - SMALL * by)[0]) / (2 * SMALL)


def at_every_token(z, advantage):
    h, p = entropy(z)
    logp = np.log(p)
    mean = np.full(len(z), (p**2 * (logp + h)).sum())
    return p, update_proxies(advantage, logp, np.full(len(z), h), mean)


def test_the_discriminant_is_exact_for_one_tabular_softmax():
    z, advantage = RNG.normal(size=7) * 2, RNG.normal(size=7)
    p, found = at_every_token(z, advantage)
    want = [moved(z, a * (np.eye(7)[y] - p)) for y, a in enumerate(advantage)]
    np.testing.assert_allclose(found["discriminant"], want, rtol=1e-7, atol=1e-10)


def test_steer_is_the_discriminant_where_all_other_tokens_are_equally_likely():
    z = np.array([1.5, *[-0.4] * 6])
    _, found = at_every_token(z, np.ones(7))
    assert found["STEER"][0] * 7 / 6 == pytest.approx(found["discriminant"][0], rel=1e-12)


def test_surprise_and_covariance_are_those_of_a_natural_gradient():
    z, advantage = RNG.normal(size=7) * 2, RNG.normal(size=7)
    p, found = at_every_token(z, advantage)
    want = [a / p[y] * moved(z, np.eye(7)[y]) for y, a in enumerate(advantage)]
    np.testing.assert_allclose(found["surprise"], want, rtol=1e-7, atol=1e-10)
    # a batch that holds every token in proportion to its probability
    counts = np.round(1e4 * p).astype(int)
    p = counts / counts.sum()
    logp, a = np.repeat(np.log(p), counts), np.repeat(advantage, counts)
    covariance = update_proxies(a, logp, np.zeros_like(a), np.zeros_like(a))["covariance"].mean()
    assert covariance == pytest.approx(moved(np.log(p), advantage), rel=1e-7)


def test_measures_are_those_of_scipy():
    group = np.repeat(np.arange(10), 6)
    share = RNG.normal(size=60).round(1)
    proxy = (share + RNG.normal(size=60)).round(1)
    found = grade_proxy(proxy, share, group)
    assert found.rank_correlation.value == pytest.approx(spearmanr(proxy, share).statistic, rel=1e-12)
    assert found.r_squared.value == pytest.approx(pearsonr(proxy, share).statistic ** 2, rel=1e-12)
    assert found.sign_agreement.value == np.mean(np.sign(proxy) == np.sign(share))
    assert found.mean == pytest.approx(proxy.mean()) and found.rank_correlation.corrected is None
    of_prompts = [proxy[group == g].mean() for g in range(10)]  # of equal sizes, so that their mean is the mean
    half = np.subtract(*found.mean_interval[::-1]) / 2
    assert half == pytest.approx(1.96 * np.std(of_prompts) / 10**0.5, rel=0.15)


def test_intervals_are_those_of_scipy_on_prompts_that_are_drawn():
    group = np.repeat(np.arange(10), RNG.integers(2, 9, size=10))
    share = RNG.normal(size=len(group)).round(1)
    proxy = (share + RNG.normal(size=len(group))).round(1) + 1000
    found, drawn = grade_proxy(proxy, share, group), []
    for weight in np.random.default_rng(SEED).multinomial(10, np.full(10, 0.1), size=RESAMPLES):
        rows = np.repeat(np.arange(len(group)), weight[group])
        x, y = proxy[rows], share[rows]
        agrees = np.mean(np.sign(x) == np.sign(y))
        drawn.append((spearmanr(x, y).statistic, pearsonr(x, y).statistic ** 2, agrees, x.mean()))
    intervals = [getattr(found, name).interval for name in ("rank_correlation", "r_squared", "sign_agreement")]
    want = np.quantile(drawn, [0.025, 0.975], axis=0).T
    np.testing.assert_allclose([*intervals, found.mean_interval], want, rtol=1e-10)


def test_what_does_not_vary_in_a_draw_has_no_part_in_the_interval():
    """Two prompts, in one of which all shares are equal: a draw of that one alone has no correlation."""
    group = np.repeat([0, 1], 4)
    share = np.array([0.1, 0.1, 0.1, 0.1, 1.0, 2.0, 3.0, 4.0])
    proxy = np.array([1.0, 2.0, 4.0, 3.0, 1.0, 2.0, 3.0, 4.0])
    found = grade_proxy(proxy, share, group)
    r_squared, whole = found.r_squared, pearsonr(proxy, share).statistic ** 2
    assert r_squared.value == pytest.approx(whole, rel=1e-12) and r_squared.interval == pytest.approx((whole, 1.0))


def test_noise_of_the_shares_is_taken_out():
    n = 6_000
    truth = RNG.normal(size=n)
    proxy, noisy = 0.6 * truth + 0.8 * RNG.normal(size=n), truth + RNG.normal(size=n)
    group = np.arange(n) // 60
    clean, found = grade_proxy(proxy, truth, group), grade_proxy(proxy, noisy, group, reliability=0.5)
    assert found.r_squared.value == pytest.approx(0.18, abs=0.02)
    assert found.r_squared.corrected == pytest.approx(clean.r_squared.value, abs=0.03)
    low, high = found.r_squared.corrected_interval
    assert low < clean.r_squared.value < high
    assert found.rank_correlation.corrected is found.sign_agreement.corrected is None
    noise_alone = grade_proxy(proxy, noisy, group, reliability=-0.2)
    assert noise_alone.r_squared.corrected is None and noise_alone.rank_correlation.value > 0


def test_one_prompt_has_no_interval_and_bad_values_are_refused():
    share = np.arange(4.0)
    alone = grade_proxy(share, share, np.zeros(4))
    assert alone.r_squared.interval is None and alone.mean_interval is None and alone.mean == 1.5
    for proxy, said in [
        (np.ones(4), "proxy: all 4 values are equal"),
        (np.ones(3), "proxy: shape"),
        (np.array([1, 2, np.nan, 3]), "proxy: nan"),
    ]:
        with pytest.raises(ValueError, match=said):
            grade_proxy(proxy, share, np.zeros(4))
