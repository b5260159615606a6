"""A run replayed, step by step, against the same rollouts one at a time in float64."""

import copy
import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import random_direction, random_model, with_lora
from one_at_a_time import TEMPERATURE, token_values
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dentropy import PackedBatch, Policy, sample
from dentropy.experiment import figures
from dentropy.experiment.judges import judged_steps
from dentropy.experiment.recorded_run import recorded_run
from dentropy.experiment.replay import Settings, replay
from dentropy.experiment.timeline import totals

SIZE = 0.05
PROMPTS = [[5, 6, 7], [8], [9, 10], [11], [12, 5], [7]]


@pytest.fixture(scope="module", autouse=True)
def without_figures_of_steps():
    """They are those of any run folder, and take a second each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", {})
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Policies after 0, 2, 3 and 4 steps, listed in a file, the first three with rollouts; no difference in the last
    step."""
    place = tmp_path_factory.mktemp("run")
    model = random_model("llama", num_hidden_layers=1)
    direction = random_direction(model).tensors
    entries = []
    for step in (0, 2, 3, 4):
        if 0 < step < 4:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.add_(direction[name], alpha=SIZE)
        model.save_pretrained(place / f"after-{step}")
        entries.append({"path": f"after-{step}", "step": step})
        if step < 4:
            drawn = sample(Policy(model), PROMPTS, per_prompt=4, max_new_tokens=8, temperature=TEMPERATURE, seed=step)
            drawn.to_jsonl(place / f"{step}.jsonl")
            entries[-1] |= {"rollouts": f"{step}.jsonl", "entropy": 1.5 - step / 8}
    (place / "run.json").write_text(json.dumps({"checkpoints": entries}))
    return place


@pytest.fixture(scope="module")
def replayed(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("replays") / "out"
    said = []
    settings = Settings(reading={"max_new_tokens": 8}, parameters=False)
    return replay(recorded_run(run / "run.json"), out, settings, said.append), out, said


def weights(run, before, after):
    """Both policies in float64, and their difference."""
    old, new = (Policy.from_pretrained(run / f"after-{step}", torch.float64, "cpu").model for step in (before, after))
    return old, new, {name: (p - old.get_parameter(name)).detach() for name, p in new.named_parameters()}


def before_each(batch, values):
    """The sum of what comes before each token in its rollout."""
    parts = np.split(values.numpy(), np.cumsum(batch.response_lens)[:-1])
    return np.concatenate([np.cumsum(part) - part for part in parts])


def change(batch, here, there):
    """ΔH from `here` to `there` with prefix weights, and the causal slope `here`."""
    h, weight = here.entropy.numpy(), np.exp(before_each(batch, there.logp - here.logp))
    slope = (here.dentropy.numpy() + before_each(batch, here.dlogp) * (h - h.mean())).mean()
    return (weight * there.entropy.numpy()).sum() / weight.sum() - h.mean(), slope


@pytest.mark.parametrize("index", [0, 1])
def test_each_step_is_measured_and_predicted_from_the_weights_after_it(run, replayed, index):
    row = replayed[0]["steps"][index]
    batch = PackedBatch.from_jsonl(run / f"{row['step_after']}.jsonl")
    old, new, moved = weights(run, row["step_before"], row["step_after"])
    here, there = token_values(new, batch, moved, 1), token_values(old, batch, moved, 0)
    delta, slope = change(batch, here, there)
    assert row["judged_by"] == "next rollouts" and row["n_rollouts"] == 24
    assert row["entropy_after"] == pytest.approx(here.entropy.mean().item(), rel=1e-5)
    assert row["measured"] == pytest.approx(-delta, rel=1e-3)
    assert row["predicted"] == pytest.approx(slope, rel=1e-3)
    assert row["entropy_after"] - row["entropy_before"] == pytest.approx(row["measured"], rel=1e-9)
    assert row["error"] == pytest.approx(row["predicted"] - row["measured"], rel=1e-9)
    # With the curvature the prediction is nearer, as the sign of its term says.
    assert abs(row["predicted_quadratic"] - row["measured"]) < abs(row["error"])
    assert [row[f"logged_entropy_{side}"] for side in ("before", "after")] == [
        1.5 - row[f"step_{side}"] / 8 for side in ("before", "after")
    ]


def test_rollouts_of_an_older_policy_that_say_so_judge_as_if_they_were_the_later_ones(run, tmp_path):
    """Those of checkpoint 0, with what it gave their tokens, judge the step from 2 to 3."""
    batch = PackedBatch.from_jsonl(run / "0.jsonl").take(range(12))
    sampler, _, moved = weights(run, 0, 2)
    logp = token_values(sampler, batch, moved, 0).logp
    replace(batch, sampler_logp=np.minimum(logp.numpy(), 0.0)).to_jsonl(tmp_path / "old.jsonl")
    entries = [{"path": str(run / f"after-{step}"), "step": step, "rollouts": "old.jsonl"} for step in (2, 3)]
    (tmp_path / "run.json").write_text(json.dumps({"checkpoints": entries}))
    said = []
    settings = Settings(parameters=False)
    (row,) = replay(recorded_run(tmp_path / "run.json"), tmp_path / "out", settings, said.append)["steps"]
    old, new, _ = weights(run, 2, 3)
    before, after = (mean_entropy(batch, token_values(model, batch, moved, 0), logp) for model in (old, new))
    assert row["entropy_after"] == pytest.approx(after, rel=1e-5)
    assert row["own_entropy_before"] == pytest.approx(before, rel=1e-5)
    assert row["measured"] == pytest.approx(after - before, rel=1e-3)
    assert token_values(new, batch, moved, 0).entropy.mean().item() != pytest.approx(after, rel=1e-3)
    assert 0.1 < row["base_weights_ess_fraction"] < 0.9 and "reweighted to an ESS of" in said[0]
    assert "reweighted, ESS" in (tmp_path / "out/report.html").read_text()


def mean_entropy(batch, here, sampler_logp):
    """By prefix weights from the sampler."""
    weight = np.exp(before_each(batch, here.logp - sampler_logp))
    return (weight * here.entropy.numpy()).sum() / weight.sum()


def test_equal_checkpoints_are_a_step_that_changes_nothing(replayed):
    last = replayed[0]["steps"][-1]
    assert (last["step_before"], last["step_after"], last["verdict"]) == (3, 4, "nothing moved")
    assert last["measured"] == last["predicted"] == 0.0 and last["judged_by"] == "fresh rollouts"


def test_what_is_written_says_the_same(replayed):
    content, out, said = replayed
    assert json.loads((out / "replay.json").read_text()) == content
    with open(out / "timeline.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["measured"]) for row in rows] == [row["measured"] for row in content["steps"]]
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    links = re.findall(r'href="(pairs/[^"]*)"', page)
    assert len(set(links)) == 2 and all((out / link).is_file() for link in links)
    assert "http" not in re.sub(r"http-equiv", "", page) and len(said) == 3


def test_steps_that_are_done_are_kept(run, replayed, monkeypatch):
    content, out, _ = replayed
    monkeypatch.setattr(Policy, "from_pretrained", None)
    settings = Settings(reading={"max_new_tokens": 8}, parameters=False)
    assert replay(recorded_run(run / "run.json"), out, settings) == content
    entries = json.loads((run / "run.json").read_text())["checkpoints"]
    entries[-1] |= {"rollouts": "3.jsonl", "entropy": 1.0}  # the run went on: those drawn anew stand
    (run / "longer.json").write_text(json.dumps({"checkpoints": entries}))
    longer = replay(recorded_run(run / "longer.json"), out, settings)
    last = content["steps"][-1] | {"logged_entropy_after": 1.0}
    assert longer["steps"] == [*content["steps"][:-1], last]
    other = Settings(reading={"max_new_tokens": 9}, parameters=False)
    with pytest.raises(ValueError, match=r"out: .*000000-000002 was made with another settings"):
        replay(recorded_run(run / "run.json"), out, other)


def test_rollouts_from_before_judge_a_step_only_if_they_did_not_make_it(run, tmp_path):
    first, second = json.loads((run / "run.json").read_text())["checkpoints"][:2]
    first |= {"path": str(run / "after-0"), "rollouts": str(run / "0.jsonl")}
    second = {"path": str(run / "after-2"), "step": 2}
    path = tmp_path / "run.json"
    for made, judge in ((True, "fresh rollouts"), (False, "held-out rollouts")):
        path.write_text(json.dumps({"checkpoints": [first | {"made_update": made}, second]}))
        (step,) = judged_steps(recorded_run(path))
        assert step.by == judge and step.backward == made and step.base.step == (2 if made else 0)
    (row,) = replay(recorded_run(path), tmp_path / "out", Settings(parameters=False))["steps"]
    batch = PackedBatch.from_jsonl(run / "0.jsonl")
    old, new, moved = weights(run, 0, 2)
    here, there = token_values(old, batch, moved, 1), token_values(new, batch, moved, 0)
    delta, slope = change(batch, here, there)
    assert row["measured"] == pytest.approx(delta, rel=1e-3) and row["predicted"] == pytest.approx(slope, rel=1e-3)
    assert row["entropy_before"] == pytest.approx(here.entropy.mean().item(), rel=1e-5)


def test_fresh_rollouts_need_a_cut(run, tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens: not given.* 000003-000004"):
        replay(recorded_run(run / "run.json"), tmp_path / "new", Settings())
    assert not (tmp_path / "new").exists()


def test_the_error_of_sum_less_whole_is_that_of_what_is_left_of_each_batch():
    """Three steps judged by batches 1, 2 and 3 of unit noise, the whole by batches 0 and 3."""
    rng = np.random.default_rng(0)
    before, after = rng.random((2, 3))  # standard errors of either end, uncorrelated here
    rows = [
        {
            "judged_by": "next rollouts",
            "verdict": "reliable",
            "logged_entropy_before": None,
            "logged_entropy_after": None,
            **dict.fromkeys(("predicted", "predicted_quadratic", "measured"), 0.0),
            **{f"{name}_stderr": 0.0 for name in ("predicted", "predicted_quadratic")},
            "measured_stderr": float(np.hypot(before[i], after[i])),
            "entropy_before": 1.0,
            "entropy_before_stderr": before[i],
            "entropy_after": 1.0,
            "entropy_after_stderr": after[i],
        }
        for i in range(3)
    ]
    rows[0] |= {"own_entropy_before": 1.0, "own_entropy_before_stderr": 0.5}
    draws = rng.standard_normal((4, 2, 400_000))
    start = 0.5 * draws[0, 0]
    there, here = before[:, None] * draws[1:, 0], after[:, None] * draws[1:, 1]
    difference = (here - there).sum(0) - (here[-1] - start)
    assert totals(rows)["difference_stderr"] == pytest.approx(difference.std(), rel=5e-3)


@pytest.mark.slow
def test_checkpoints_that_are_adapters(tmp_path):
    """The first step puts the adapter on its base model, the second moves it: against the policies in float64."""
    random_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "after-0")
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "after-0").eval())
    entries, drawn = [{"path": "after-0", "step": 0}], {}
    for step in (1, 2):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.mul_(1.5 if step == 2 else 0.7)
        model.save_pretrained(tmp_path / f"after-{step}")
        drawn[step] = sample(Policy(model), PROMPTS, per_prompt=2, max_new_tokens=8, temperature=TEMPERATURE, seed=step)
        drawn[step].to_jsonl(tmp_path / f"{step}.jsonl")
        entries.append({"path": f"after-{step}", "step": step, "rollouts": f"{step}.jsonl"})
    (tmp_path / "run.json").write_text(json.dumps({"checkpoints": entries}))
    rows = replay(recorded_run(tmp_path / "run.json"), tmp_path / "out", Settings())["steps"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "after-0", dtype=torch.float64)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "after-1").merge_and_unload()
    added = {name: (p - base.get_parameter(name)).detach() for name, p in merged.named_parameters()}
    for row, (old, new, moved) in zip(rows, ((base, merged, added), weights(tmp_path, 1, 2)), strict=True):
        batch = drawn[row["step_after"]]
        delta, slope = change(batch, token_values(new, batch, moved, 1), token_values(old, batch, moved, 0))
        assert row["measured"] == pytest.approx(-delta, rel=1e-3) and row["predicted"] == pytest.approx(slope, rel=1e-3)
    content = json.loads((tmp_path / "out/pairs/000000-000001/probe/results.json").read_text())
    shares = content["audit"]["contributions"]["parameters"]  # of base weights, which training left as they were
    assert shares["sum"] == pytest.approx(shares["expected"], rel=1e-4)
