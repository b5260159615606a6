"""Pareto k̂ against known tails, smoothed weights against fitted quantiles, what the verdict turns on."""

import dataclasses
import subprocess
import sys
import warnings

import numpy as np
import pytest
from chains import ChainPolicy
from oracles import TinyPolicy
from scipy import stats

from dentropy.estimators import importance, importance_diagnostics
from dentropy.estimators.diagnostics import pareto_smooth
from dentropy.stats.tables import SequenceSums


def measured(log_weights, *, per_group=8, seed=0, per="token", prompts="random", group=None):
    """A measurement whose log-weights are given, of rollouts with random lengths and entropies."""
    rng, count = np.random.default_rng(seed), len(log_weights)
    n_tokens = rng.integers(20, 40, count)
    rollout = np.arange(count)
    base = SequenceSums(
        n_tokens=n_tokens,
        logp=-2.0 * n_tokens,
        entropy=n_tokens * rng.uniform(1, 2, count),
        group=rollout // per_group if group is None else group,
        rollout=rollout,
    )
    entropy = base.entropy * rng.uniform(0.8, 1, count)
    moved = dataclasses.replace(base, logp=base.logp + log_weights, entropy=entropy)
    return importance(base, moved, per=per, prompts=prompts)


def lognormal(sigma, count=512, mean=1.0):
    """Log-weights whose weights have the given mean."""
    log_weights = sigma * np.random.default_rng(5).standard_normal(count)
    return log_weights + np.log(mean / np.mean(np.exp(log_weights)))


def heavy(shape, scale, count=512):
    """Log-weights of 1 + scale · (generalized Pareto of that shape), scaled to a mean of 1."""
    weights = 1 + scale * stats.genpareto(shape).rvs(count, random_state=5)
    return np.log(weights / weights.mean())


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.6, 0.9, 1.3])
def test_khat_is_the_shape_of_the_tail(shape):
    found, own = [], []
    for seed in range(20):
        weights = 1 + stats.genpareto(shape).rvs(10_000, random_state=seed)
        found.append(pareto_smooth(np.log(weights))[1])
        tail = np.sort(weights)[-300:] - np.sort(weights)[-301]
        own.append(stats.genpareto.fit(tail, floc=0)[0])
    # A weak prior on 0.5, worth 10 of the 300 tail weights, is part of k̂.
    np.testing.assert_allclose(found, (300 * np.array(own) + 10 * 0.5) / 310, atol=0.05)
    assert np.mean(found) == pytest.approx((300 * shape + 5) / 310, abs=0.04)


@pytest.mark.parametrize("count, tail", [(100, 20), (225, 45), (1000, 94)])
def test_smoothing_puts_the_fitted_quantiles_in_place_of_the_largest_weights(count, tail):
    log_weights = heavy(0.6, 0.5, count)
    smoothed, khat, reason = pareto_smooth(log_weights)
    assert reason is None and np.exp(smoothed).sum() == pytest.approx(1, rel=1e-12)
    order = np.argsort(log_weights)
    body, top = order[:-tail], order[-tail:]
    shift = smoothed[body[0]] - log_weights[body[0]]
    np.testing.assert_allclose(smoothed[body] - log_weights[body], shift, atol=1e-12)
    weights = np.exp(smoothed - shift)  # on the scale of the raw ones
    assert weights.max() <= np.exp(log_weights.max()) * (1 + 1e-12)
    quantiles = stats.genpareto(khat).ppf((np.arange(tail) + 0.5) / tail)
    over = weights[top] - np.exp(log_weights[order[-tail - 1]])
    free = weights[top] < np.exp(log_weights.max()) * (1 - 1e-9)  # none exceeds the largest raw weight
    assert free.sum() > 0.8 * tail
    np.testing.assert_allclose(over[free] / over[0], quantiles[free] / quantiles[0], rtol=1e-9)


def test_a_common_factor_of_the_weights_changes_nothing_but_their_mean():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near, far = (importance_diagnostics(measured(heavy(0.6, 0.5) + shift)) for shift in (0.0, 2000.0))
    assert far.khat == pytest.approx(near.khat, rel=1e-8)
    assert far.smoothed_delta == pytest.approx(near.smoothed_delta, rel=1e-8)
    assert far.mean_weight_stderr == np.inf and np.isfinite(far.mean_weight_z)


def test_smoothed_delta_is_the_definition_and_leaves_light_tails_alone():
    result = measured(lognormal(0.3))
    found = importance_diagnostics(result)
    w = np.exp(found.smoothed_log_weights.astype(np.longdouble))
    expected = (w * result.moved_entropy).sum() / (w * result.size).sum() - result.base_value
    assert found.smoothed_delta == pytest.approx(float(expected), rel=1e-12)
    assert abs(found.smoothed_delta - result.delta) < 0.1 * result.stderr
    assert importance_diagnostics(measured(heavy(0.9, 0.5))).smoothed_delta != pytest.approx(
        measured(heavy(0.9, 0.5)).delta, rel=1e-4
    )


def test_products_are_those_of_the_ratio():
    result = measured(lognormal(0.5))
    found = importance_diagnostics(result)
    w, H = np.exp(result.log_weights), result.moved_entropy
    assert found.khat == pytest.approx(pareto_smooth(np.log(w))[1], rel=1e-9)
    assert found.khat_tokens == pytest.approx(pareto_smooth(np.log(w * result.size))[1], rel=1e-9)
    assert found.khat_entropy == pytest.approx(pareto_smooth(np.log(w * H))[1], rel=1e-9)
    assert len({found.khat, found.khat_tokens, found.khat_entropy}) == 3 and found.khat_reason is None
    sequence = importance_diagnostics(measured(lognormal(0.5), per="sequence"))
    assert sequence.khat_tokens == sequence.khat


@pytest.mark.parametrize("count, threshold", [(64, 0.446), (1024, 0.668), (4000, 0.7)])
def test_threshold_grows_with_the_rollouts(count, threshold):
    found = importance_diagnostics(measured(lognormal(0.3, count)))
    assert found.khat_threshold == pytest.approx(threshold, abs=1e-3)


def test_mean_weight_against_its_error():
    result = measured(lognormal(0.5))
    found = importance_diagnostics(result)
    means = np.exp(result.log_weights).reshape(64, 8).mean(1)
    assert found.mean_weight_stderr == pytest.approx(means.std(ddof=1) / 8, rel=1e-12)
    assert found.mean_weight_z == pytest.approx((result.mean_weight - 1) / found.mean_weight_stderr, rel=1e-9)
    alone = importance_diagnostics(measured(lognormal(0.5), group=np.zeros(512, dtype=int)))
    assert alone.mean_weight_stderr is None and alone.mean_weight_z is None
    same = importance_diagnostics(measured(np.tile([0.5, -0.5], 64), per_group=2))  # every group has one sum
    assert same.mean_weight_stderr == 0 and same.mean_weight_z is None and same.verdict == "strained"


def test_equal_weights_need_no_khat():
    for log_weights in (np.zeros(512), np.full(512, 0.3), 1e-13 * np.arange(512)):
        found = importance_diagnostics(measured(log_weights))
        assert found.khat is found.khat_tokens is found.khat_entropy is found.smoothed_delta is None
        assert found.khat_reason == "not needed: all weights are equal"
    found = importance_diagnostics(measured(np.zeros(1)))
    assert found.khat_reason == "not needed: all weights are equal" and found.verdict == "unusable"


def test_tails_that_cannot_be_fitted_say_why():
    few = importance_diagnostics(measured(lognormal(0.3, 24)))
    assert few.khat is few.smoothed_delta is None
    assert few.khat_reason == "24 rollouts are too few for a tail, 25 are needed"
    assert pareto_smooth(lognormal(0.3, 25))[2] is None
    ties = np.where(np.arange(100) < 50, lognormal(0.3, 100) - 9, 1.0)
    assert pareto_smooth(ties)[2] == "too many equal weights where the tail begins"
    top = np.sort(lognormal(0.3, 100))
    top[-20:] = top[-1]
    assert pareto_smooth(top)[2] == "the largest 20 weights are equal"
    assert pareto_smooth(np.append(np.linspace(-2000, -1000, 99), 0.0))[2] is not None  # they underflow


def test_rollouts_without_tokens_or_without_entropy():
    base = measured(lognormal(0.3))
    n_tokens = base.size * (np.arange(512) % 50 > 0)
    entropy = np.where(np.arange(512) % 50 < 2, 0.0, base.moved_entropy)
    rollout = np.arange(512)
    sums = SequenceSums(n_tokens=n_tokens, logp=np.zeros(512), entropy=entropy, group=rollout // 8, rollout=rollout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = importance_diagnostics(importance(sums, dataclasses.replace(sums, logp=lognormal(0.3))))
    assert found.khat_reason is None and found.verdict == "reliable"


MIXED = np.log(
    np.where(
        np.arange(512) % 5 == 0,
        np.random.default_rng(0).uniform(4, 5, 512),
        np.random.default_rng(1).uniform(0, 0.2, 512),
    )
)


@pytest.mark.parametrize(
    "log_weights, verdict, reason",
    [
        (np.zeros(512), "reliable", "the ESS is 100.0% of 512 rollouts"),
        (lognormal(0.5), "reliable", "the largest k̂"),
        (lognormal(0.3), "reliable", "the ESS is 92.1% of 512 rollouts"),
        (lognormal(5.0), "unusable", "the ESS of w"),
        (heavy(1.2, 0.05, 4000), "unusable", "above 1: a tail without a mean"),
        (lognormal(0.3, mean=0.4), "unusable", "the mean weight is 0.4"),
        (heavy(0.9, 0.1), "strained", "above 0.63: 512 rollouts are few for such a tail"),
        (MIXED, "strained", "of 512 rollouts, below a half"),
        (lognormal(0.3, mean=1.2), "strained", "the mean weight is 1.2"),
        (lognormal(0.8, 24), "strained", "no k̂ to judge the weights by: 24 rollouts"),
        (lognormal(0.2, 24), "reliable", "of 24 rollouts"),
        # as on a nearly deterministic policy: a few values, of weights that are nearly equal
        (np.log(np.repeat([0.9998, 1.5, 2.5, 3.0], [490, 15, 4, 3])), "reliable", "of 512 rollouts"),
        (np.full(512, 0.3), "strained", "the mean weight is 1.35, the same in every group"),
        (np.full(512, -1.0), "unusable", "the mean weight is 0.368, the same in every group: the rollouts miss"),
        (heavy(1.2, 0.003), "reliable", "the ESS is 91.1% of 512 rollouts"),  # w is too even for a tail to matter
    ],
)
def test_verdict_names_the_number_that_decided(log_weights, verdict, reason):
    found = importance_diagnostics(measured(log_weights, per_group=8 if len(log_weights) > 24 else 2))
    assert (found.verdict, reason in found.reason) == (verdict, True), found.reason


def test_a_result_that_hangs_on_the_smoothing_is_strained():
    result = measured(lognormal(0.5))
    found = importance_diagnostics(dataclasses.replace(result, stderr=abs(result.delta) * 1e-9))
    assert found.verdict == "strained" and "by more than its standard error" in found.reason


@pytest.mark.parametrize("count, least", [(64, 0.95), (512, 0.97)])
def test_harmless_measurements_are_called_reliable(count, least):
    """ESS about 95%, where intervals keep their level; with k̂ counted up to 99% it is 65% at 64 rollouts."""
    policy = TinyPolicy(horizon=6, n_prompts=64)
    before, after = policy.columns(0.0), policy.columns(0.15)
    drawn = policy.sample(np.random.default_rng(3), 200, n_groups=64, per_group=count // 64)
    found = []
    for batch in zip(*drawn, strict=True):
        base, moved = (policy.table(*batch, columns, per_group=count // 64) for columns in (before, after))
        found.append(importance(base, moved))
    assert 0.9 < np.median([result.ess_fraction for result in found]) < 0.98
    assert np.mean([importance_diagnostics(result).verdict == "reliable" for result in found]) > least


def test_a_nearly_deterministic_policy_whose_weights_are_nearly_equal_is_reliable():
    """512 rollouts at an exact ESS of 95%: weights of few values, whose k̂ alone would make them unusable."""
    policy, eta = TinyPolicy(n_prompts=64, shift=lambda prefix: [0.0, 0.0, 6.0, 0.0]), 0.358
    before, after = policy.columns(0.0), policy.columns(eta)
    change = policy.truth(eta)[0] - policy.truth()[0]
    found, inside = [], []
    for batch in zip(*policy.sample(np.random.default_rng(0), 50, n_groups=64, per_group=8), strict=True):
        result = importance(*(policy.table(*batch, columns, per_group=8) for columns in (before, after)))
        low, high = result.interval()
        inside.append(low < change < high)
        found.append(importance_diagnostics(result).verdict)
    assert found.count("reliable") > 40 and found.count("unusable") < 8 and np.sum(inside) > 42


def test_chains_of_31_tokens_at_an_ess_of_95_and_80_percent():
    """64 rollouts. Intervals of every kind cover; at an ESS of 80% k̂ strains some, fewer with prefix weights."""
    policy = ChainPolicy()
    rollouts = policy.sample(np.random.default_rng(1), 64 * 40, 4)
    base, reliable = rollouts.tables(0.0, 40), {}
    for eta in (0.05, 0.1):
        moved, change = rollouts.tables(eta, 40), policy.truth(eta)[0] - policy.truth()[0]
        for weights in ("sequence", "prefix"):
            results = [importance(*pair, weights=weights) for pair in zip(base, moved, strict=True)]
            found = [importance_diagnostics(result).verdict for result in results]
            ends = [result.interval() for result in results]
            assert np.mean([low < change < high for low, high in ends]) > 0.85
            assert "unusable" not in found
            reliable[eta, weights] = found.count("reliable") / 40
    assert reliable[0.05, "sequence"] == reliable[0.05, "prefix"] == 1
    assert 0.5 < reliable[0.1, "sequence"] < 0.95 < reliable[0.1, "prefix"]


@pytest.mark.parametrize("n_groups", [1, 64])
def test_a_moved_policy_that_has_become_uniform_is_unusable(n_groups):
    """As with η so large that the logits overflow to one constant: whatever the weights look like."""
    result = measured(lognormal(0.2), group=np.arange(512) % n_groups)
    flat = importance_of(result, moved_entropy=np.float32(2.3) * result.size)
    assert importance_diagnostics(result).verdict == "reliable"
    found = importance_diagnostics(flat)
    assert found.verdict == "unusable" and "every rollout has the same entropy per token" in found.reason


def test_copies_of_one_rollout_are_no_measurement():
    n = np.full(512, 7.0)
    base = SequenceSums(n_tokens=n, logp=-2 * n, entropy=n, group=np.arange(512) // 8, rollout=np.arange(512))
    result = importance(base, dataclasses.replace(base, entropy=1.1 * n))
    assert result.stderr == pytest.approx(0, abs=1e-12)
    assert importance_diagnostics(result).verdict == "unusable"
    assert importance_diagnostics(importance(base, base)).verdict == "reliable"  # nothing moved


def importance_of(result, moved_entropy):
    """The measurement with other entropies at the moved weights."""
    base_entropy = result.base_value * result.size
    base = SequenceSums(
        n_tokens=result.size,
        logp=np.zeros(result.n),
        entropy=base_entropy,
        group=result.group,
        rollout=np.arange(result.n),
    )
    return importance(base, dataclasses.replace(base, logp=result.log_weights, entropy=moved_entropy))


@pytest.mark.parametrize("n_batches", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_the_verdict_turns_before_intervals_fail(n_batches):
    """A sweep into collapse: answers grow longer, and the rollouts have ever less to say about them."""
    policy = TinyPolicy(horizon=6, n_prompts=64)
    etas = (-0.01, -0.1, -0.3, -0.5, -0.8, -1.2, -2.0, -3.0)
    columns = {eta: policy.columns(eta) for eta in (0.0, *etas)}
    truth = {eta: policy.truth(eta)[0] - policy.truth(0.0)[0] for eta in etas}
    misses = {"reliable": [], "strained": [], "unusable": []}
    drawn = policy.sample(np.random.default_rng(11), n_batches, n_groups=64, per_group=8)
    for batch in zip(*drawn, strict=True):
        base = policy.table(*batch, columns[0.0], per_group=8)
        verdicts = []
        for eta in etas:
            result = importance(base, policy.table(*batch, columns[eta], per_group=8))
            low, high = result.interval()
            verdicts.append(importance_diagnostics(result).verdict)
            misses[verdicts[-1]].append(not low < truth[eta] < high)
        assert verdicts[0] == "reliable" and verdicts[-1] != "reliable"
    rate = {verdict: np.mean(missed) for verdict, missed in misses.items()}
    assert rate["reliable"] < 0.075  # nominal: 0.05
    assert rate["unusable"] > 0.12
    assert len(misses["reliable"]) > 3 * n_batches


def test_arviz_is_asked_for_by_name_and_brings_no_xarray(monkeypatch):
    code = (
        "import sys; from dentropy.estimators.diagnostics import pareto_smooth as p; import numpy as np;"
        "p(np.sin(np.arange(100.0))); print('arviz_stats' in sys.modules, 'xarray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"
    monkeypatch.setitem(sys.modules, "arviz_stats.base", None)
    with pytest.raises(ImportError, match=r'Pareto k̂ needs arviz-stats: pip install "dentropy\[probe\]"'):
        importance_diagnostics(measured(lognormal(0.3)))
