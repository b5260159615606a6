"""Coverage of the forecast's 95% intervals over many batches of an enumerable policy: 16 prompts with 8 answers each.

100 batches by default, with bounds wider by what chance does to so few, and 10,000 in the slow form. Means cover 93 to
97%, and so does the KL divergence on the log scale. With fixed prompts pass@k goes by the jackknife, whose variance is
too large by what is not linear: it covers up to 98%.
"""

from functools import lru_cache

import numpy as np
import pytest
from gains import Gains, batches
from oracles import TinyPolicy
from tables import prompts_both

from dentropy import forecast

GAINS = Gains(TinyPolicy())
ETA = 0.1
KS = (1, 2, 4)
QUICK = 100
sizes = pytest.mark.parametrize("n_batches", [QUICK, pytest.param(10_000, marks=pytest.mark.slow)])


@lru_cache(maxsize=1)
def simulated(n_batches, prompts):
    """By name: (value, stderr, low, high) of every batch, [4, batches]."""
    found = {}
    for base, moved, right, score in batches(GAINS, seed=5, prompts=prompts, n_batches=n_batches, etas=(ETA,)):
        cast = forecast(base, moved, right, {"score": score}, pass_at_k=KS, prompts=prompts)
        named = {"length": cast.length, "reward": cast.reward, "score": cast.values["score"]}
        named |= {f"pass@{k}": change for k, change in cast.pass_at_k.items()}
        statistics = {f"{name} slope": change.slope for name, change in named.items()}
        statistics |= {f"{name} change": change.changes[ETA] for name, change in named.items()}
        statistics |= {"kl forecast": cast.kl.forecast(ETA), "kl": cast.kl.measured[ETA]}
        for name, s in statistics.items():
            found.setdefault(name, []).append((s.value, s.stderr, *s.interval()))
    return {name: np.array(rows).T for name, rows in found.items()}


def exchange_rates(n_batches):
    """Of the slopes, for a reward that counts tokens as a cost, one batch after the other."""
    for base, _, right, _ in batches(GAINS, seed=6, n_batches=n_batches):
        yield forecast(base, {}, right - base.n_tokens).exchange_rate


def lengths():
    return np.broadcast_to(GAINS.policy.lengths, GAINS.right.shape)


def truths():
    known = {}
    for name, values in (("length", lengths()), ("reward", GAINS.right), ("score", GAINS.score)):
        now, slope, _ = GAINS.mean(values)
        known |= {f"{name} slope": slope, f"{name} change": GAINS.mean(values, ETA)[0] - now}
    for k in KS:
        now, slope = GAINS.pass_at(k)
        known |= {f"pass@{k} slope": slope, f"pass@{k} change": GAINS.pass_at(k, ETA)[0] - now}
    fisher = (GAINS.probability(0.0)[0] * GAINS.fisher).sum(-1).mean()
    return known | {"kl forecast": ETA**2 / 2 * fisher, "kl": GAINS.divergence(ETA)}


@sizes
@prompts_both
def test_intervals_cover(prompts, n_batches):
    found, slack = simulated(n_batches, prompts), 3 * (0.05 / n_batches) ** 0.5 if n_batches == QUICK else 0.0
    for name, truth in truths().items():
        value, stderr, low, high = found[name]
        spread = value.std(ddof=1)
        assert abs(value.mean() - truth) < 4 * spread / n_batches**0.5, name  # no bias at all
        covered = np.mean((low < truth) & (truth < high))
        most = 0.98 if prompts == "fixed" and name.startswith("pass@") else 0.97
        assert 0.93 - slack < covered < most + slack, (name, covered)


@sizes
def test_the_exchange_rate_covers(n_batches):
    """Of the net reward, which the step moves for sure: on nearly every batch there is an interval."""
    slack = 3 * (0.05 / n_batches) ** 0.5 if n_batches == QUICK else 0.0
    truth = GAINS.policy.truth()[1] / (GAINS.mean(GAINS.right)[1] - GAINS.mean(lengths())[1])
    rates = [rate for rate in exchange_rates(n_batches) if rate.interval is not None]
    assert len(rates) > 0.95 * n_batches
    covered = np.mean([rate.interval[0] < truth < rate.interval[1] for rate in rates])
    assert 0.93 - slack < covered < 0.97 + slack
