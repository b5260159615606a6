"""A probe of rollouts that another sampler drew: the same policy at another temperature."""

import dataclasses

import numpy as np
import pytest
from models import random_direction, random_model

from dentropy import Direction, Policy, measure, policy_gradient_step, probe, sample
from dentropy.estimators import slope
from dentropy.experiment.report.provenance import provenance
from dentropy.experiment.results_schema import check

STEP = 0.01
PROMPTS = [[5, 6, 7], [8], [9, 10], [11]]
REWARD = np.arange(32.0) % 3


@pytest.fixture(scope="module")
def rollouts():
    """(policy, direction, rollouts drawn at temperature 1.3 and said to be so, the policy being that at 1)."""
    policy = Policy(random_model("llama"))
    hot = sample(policy, PROMPTS, per_prompt=8, max_new_tokens=8, temperature=1.3)
    logp = measure(policy, hot, keep_tokens=True).tokens.logp.double().numpy()
    batch = dataclasses.replace(hot, temperature=1.0, sampler_logp=np.minimum(logp, 0.0), reward=REWARD)
    return policy, batch


@pytest.fixture(scope="module")
def result(rollouts):
    policy, batch = rollouts
    step = policy_gradient_step(policy, dataclasses.replace(batch, sampler_logp=None), step_size=STEP, optimizer="sgd")
    return probe(policy, batch, step.direction(), [STEP], update=step)


def test_the_table_has_what_the_sampler_said(rollouts, result):
    _, batch = rollouts
    ends = batch.response_offsets
    assert np.allclose(result.base.sampler_logp, [batch.sampler_logp[a:b].sum() for a, b in zip(ends, ends[1:])])
    assert np.array_equal(result.base.sampler_tokens, batch.sampler_logp)
    plain = measure(rollouts[0], dataclasses.replace(batch, sampler_logp=None))
    assert "sampler_logp" not in plain.columns() and plain.sampler_tokens is None


def test_every_part_of_a_run_is_of_the_weighted_rollouts(result):
    content = result.content
    weight = np.exp(result.base.logp - result.base.sampler_logp)
    assert content["base_weights"]["sequence"]["ess"] == pytest.approx(weight.sum() ** 2 / np.sum(weight**2), rel=1e-12)
    assert content["base_weights"]["entropy"] == pytest.approx(content["base_entropy"], rel=1e-12)
    exact = slope(result.base, estimator="exact").value
    h, t = (np.sum(weight * x) for x in (result.base.entropy, result.base.n_tokens))
    by_hand = np.sum(
        weight * (result.base.dentropy + (result.base.entropy - h / t * result.base.n_tokens) * result.base.dlogp)
    )
    assert exact == pytest.approx(by_hand / t, rel=1e-9)
    for found in content["audit"]["contributions"].values():
        assert found["sum"] == pytest.approx(found["expected"], rel=1e-5, abs=1e-9)
    causal = result.slopes["causal"].value
    assert sum(part["contribution"] for part in content["attribution"]["by_lag"]) == pytest.approx(causal, rel=1e-6)
    uncorrected = result.columns()["slope_uncorrected"].sum()
    assert uncorrected == pytest.approx(result.slopes["causal"].parts["uncorrected"], rel=1e-9)
    assert content["forecast"]["reward"]["base"] == pytest.approx(np.sum(weight * REWARD) / weight.sum())
    assert abs(result.update.unexplained) < 1e-4 * np.abs(result.update.share).sum()
    check(content, "results.json")


def test_the_weights_are_shown(result):
    said = "rollouts of another sampler, reweighted: ESS "
    assert said in result.summary() and "base_weight z = " in result.summary()
    assert said in dict(provenance(result.content)["facts"])["Sampler"]
    assert result.content["base_weights"]["verdict"] in ("reliable", "strained")


def test_pass_at_k_is_refused_before_any_work(rollouts):
    policy, batch = rollouts
    direction = Direction(random_direction(policy.model).tensors, STEP)
    with pytest.raises(ValueError, match="pass_at_k: of rollouts with sampler_logp"):
        probe(policy, batch, direction, [STEP], pass_at_k=[2])
