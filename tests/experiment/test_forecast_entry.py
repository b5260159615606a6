"""`forecast` in results.json, and the sentence that comes from it."""

import copy
import dataclasses

import numpy as np
import pytest
from models import random_direction, random_model
from runs import ETAS, STEP

from dentropy import Direction, Policy, forecast, probe, sample
from dentropy.experiment import forecast_entry
from dentropy.experiment.results_schema import check
from dentropy.experiment.run_folder import load
from dentropy.experiment.trade import trade
from dentropy.experiment.warned import warned


def test_the_entry_holds_what_forecast_finds(result):
    reward = result.batch.reward[result.base.rollout]
    found = forecast(result.base, {change.eta: change.moved for change in result.changes}, reward)
    entry = result.content["forecast"]
    for name in ("reward", "length"):
        change = getattr(found, name)
        assert entry[name]["base"] == change.base and entry[name]["slope"]["value"] == change.slope.value
        assert [(c["eta"], c["value"], c["stderr"]) for c in entry[name]["changes"]] == [
            (eta, change.changes[eta].value, change.changes[eta].stderr) for eta in ETAS
        ]
    for per, divergence in (("sequence", found.kl), ("token", found.kl_per_token)):
        measured = entry["kl"][per]["changes"]
        assert [c["value"] for c in measured] == [divergence.measured[eta].value for eta in ETAS]
        assert [c["interval"] for c in measured] == [list(divergence.measured[eta].interval()) for eta in ETAS]
    assert entry["exchange_rate"]["slope"]["value"] == found.exchange_rate.value


def test_the_entropy_is_what_the_run_leads_with(result):
    content = result.content
    entropy, causal = content["forecast"]["entropy"], content["slope"][0]
    assert entropy["base"] == content["base_entropy"]
    assert (entropy["slope"]["value"], entropy["slope"]["stderr"]) == (causal["value"], causal["stderr"])
    leading = [(m["eta"], m["delta"], m["stderr"]) for m in content["measured"]]
    assert [(c["eta"], c["value"], c["stderr"]) for c in entropy["changes"]] == leading


def test_what_cannot_be_had_is_null_with_its_reason():
    policy = Policy(random_model("llama"))
    batch = sample(policy, [[5, 6, 7], [8]], per_prompt=4, max_new_tokens=6)
    direction = Direction(random_direction(policy.model).tensors, STEP)
    found = probe(policy, batch, direction, [STEP], parameters=False)
    entry = found.content["forecast"]
    for name in ("reward", "exchange_rate", "pass_at_k"):
        assert entry[name] is None and entry["reasons"][name] == "the rollouts have no reward"
    assert "reward" not in trade(found.content) and "length" in trade(found.content)
    check(found.content, "results.json")
    right = dataclasses.replace(batch, reward=np.array([0.0, 1.0] * 4))
    content = probe(policy, right, direction, [STEP], parameters=False, pass_at_k=[1, 2]).content
    binary = content["forecast"]
    assert any(text.startswith("slope of pass@2: pass@2 can change in 2 of 2") for text in warned(content))
    assert [e["k"] for e in binary["pass_at_k"]] == [1, 2] and "pass_at_k" not in binary["reasons"]
    assert binary["pass_at_k"][0]["slope"]["value"] == pytest.approx(binary["reward"]["slope"]["value"], rel=1e-12)
    for ks, message in ([5], "pass_at_k: 5, but group 0 has 4"), ([1], "reward: None"):
        with pytest.raises(ValueError, match=message):
            probe(policy, right if ks == [5] else batch, direction, [STEP], pass_at_k=ks)


def test_too_far_to_measure_is_null_and_said(result):
    near = {ETAS[0]: result.changes[0].moved}
    found = forecast_entry.forecast(forecast(result.base, near, result.batch.reward), ETAS)
    far = found["length"]["changes"][-1]
    assert far["value"] is None and "beyond 300 nats" in far["stderr_reason"]
    assert "beyond 300 nats" in found["exchange_rate"]["changes"][-1]["reason"]


def test_a_run_is_read_back(run, result):
    assert load(run)["forecast"] == result.content["forecast"]


STATED = {"reward": (0.012, 0.003), "entropy": (-0.0066, 0.0006), "length": (-0.3, 0.1)}


def stated():
    """A run whose forecast has round numbers, at step size 1e-4."""

    def entry(value, stderr):
        return {"eta": 1e-4, "value": value, "stderr": stderr, "interval": [value - 2 * stderr, value + 2 * stderr]}

    def slope(value, stderr):
        return {name: np.multiply(x, 2e4).tolist() for name, x in entry(value, stderr).items() if name != "eta"}

    found = {name: {"base": 0.5, "slope": slope(*x), "changes": [entry(*x)]} for name, x in STATED.items()}
    kl = {"fisher": {"value": 2e5, "stderr": 2e4}, "changes": [entry(0.0012, 0.0002)]}
    rate = {"value": -0.55, "interval": [-0.9, -0.35], "reason": None}
    found["kl"] = {"sequence": kl, "token": kl}
    found["exchange_rate"] = {"slope": rate | {"value": -0.5}, "changes": [{"eta": 1e-4, **rate}]}
    measured = {"eta": 1e-4, "delta": -0.0066, "verdict": "reliable", "below_noise_floor": False}
    return {"step_size": 1e-4, "measured": [measured], "forecast": found}


def test_the_sentence():
    assert trade(stated()) == (
        "At step size 1e-4 this step buys reward +0.012 ± 0.003, costs entropy −0.0066 ± 0.0006 nats per token, "
        "shortens answers by 0.30 ± 0.10 tokens and moves the policy by a KL divergence of 0.00120 ± 0.00020 nats per "
        "rollout (measured). Exchange rate: −0.55 nats per token of entropy per unit of reward (95%: −0.90 to −0.35)."
    )


def test_the_sentence_without_a_measurement_is_the_slopes():
    run = stated()
    run["measured"][0]["verdict"] = "unusable"
    said = trade(run)
    assert "buys reward +0.024 ± 0.006" in said and "KL divergence of 0.00100 ± 0.00010 nats" in said
    assert "(predicted)" in said and "Exchange rate: −0.5" in said


def test_the_sentence_leaves_out_what_is_null_and_says_what_is_not_told_apart():
    run = stated()
    run["forecast"] |= {"reward": None, "exchange_rate": None}
    assert "reward" not in trade(run)
    run = stated()
    run["forecast"]["reward"]["changes"][0] |= {"value": 0.001, "interval": [-0.005, 0.007]}
    rate = run["forecast"]["exchange_rate"]["changes"][0]
    rate |= {"value": None, "interval": None, "reason": "the change of reward is not told apart from 0"}
    said = trade(run)
    assert "does not change reward measurably (+0.001 ± 0.003)" in said
    assert said.endswith("No exchange rate: the change of reward is not told apart from 0.")
    assert trade({name: value for name, value in run.items() if name != "forecast"}) is None


@pytest.mark.parametrize("name", ["reward", "entropy", "length"])
def test_the_schema_asks_for_changes(result, name):
    content = copy.deepcopy(result.content)
    del content["forecast"][name]["changes"][0]["stderr"]
    with pytest.raises(ValueError, match=f"forecast.{name}.changes.0"):
        check(content, "results.json")
