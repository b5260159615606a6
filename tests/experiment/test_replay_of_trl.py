"""A run of TRL's GRPO trainer, replayed as it lies on disk."""

import itertools
import json

import numpy as np
import pytest
from peft import LoraConfig
from trainers import sampling_trainer, tiny_model
from transformers import AutoModelForCausalLM

from dentropy.cli import main
from dentropy.examples import grpo_run
from dentropy.experiment import figures
from dentropy.experiment.recorded_run import recorded_run
from dentropy.experiment.sampled_by import Schedule

KEPT = grpo_run.KEPT | dict(max_steps=3)


@pytest.mark.filterwarnings("ignore:`:FutureWarning")
def test_a_tiny_run_is_replayed_by_what_it_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FIGURES", {})  # of each step
    sampling_trainer("grpo", tmp_path / "run", settings=KEPT).train()
    options = "--temperature 1.5 --append-eos --max-new-tokens 6 --skip-parameters --update-tokens --max-grad-norm 1"
    assert main(["replay", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *options.split()]) == 0
    content = json.loads((tmp_path / "out" / "replay.json").read_text())
    rows = content["steps"]
    assert [(row["step_before"], row["step_after"], row["judged_by"]) for row in rows] == [
        (1, 2, "next rollouts"),
        (2, 3, "fresh rollouts"),
    ]
    assert rows[0]["rollouts"].endswith("completions_00003.parquet") and rows[0]["n_rollouts"] == 8
    state = json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text())
    history = {entry["step"]: entry for entry in state["log_history"] if "entropy" in entry}
    assert [row["logged_entropy_before"] for row in rows] == [history[step]["entropy"] for step in (2, 3)]
    assert rows[1]["logged_entropy_after"] is None
    for row in rows:
        terms = sum(row[f"update_{name}"] for name in ("tokens", "momentum", "weight_decay", "unexplained"))
        assert terms == pytest.approx(row["predicted"], rel=1e-6)
        folder = tmp_path / "out/pairs" / f"{row['step_before']:06d}-{row['step_after']:06d}"
        step, rate = (
            json.loads((folder / "probe/results.json").read_text()),
            history[row["step_after"]]["learning_rate"],
        )
        assert step["step_size"] == pytest.approx(rate) and step["measured"][0]["eta"] == pytest.approx(-rate)
    assert "sum of the measured changes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`:FutureWarning")
def test_a_run_of_adapters_begins_at_its_base_model(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {})
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    sampling_trainer("grpo", tmp_path / "run", model=model, settings=KEPT, peft_config=lora).train()
    options = "--temperature 1.5 --append-eos --max-new-tokens 6 --update-tokens --max-grad-norm 1"
    assert main(["replay", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *options.split()]) == 0
    content = json.loads((tmp_path / "out" / "replay.json").read_text())
    rows = content["steps"]
    assert "checkpoint 0 is" in content["notes"][0] and "base" in content["notes"][0]
    assert [(row["step_before"], row["step_after"], row["judged_by"]) for row in rows] == [
        (0, 1, "next rollouts"),
        (1, 2, "next rollouts"),
        (2, 3, "fresh rollouts"),
    ]
    for row in rows[:2]:  # texts have lost some tokens of so random a policy
        assert row["entropy_after"] == pytest.approx(row["logged_entropy_after"], rel=0.05)
    assert rows[0]["own_entropy_before"] == pytest.approx(rows[0]["logged_entropy_before"], rel=0.05)
    assert rows[0]["measured"] == pytest.approx(rows[0]["predicted_quadratic"], rel=0.2)
    assert "update_tokens" not in rows[0] and rows[1]["update_cosine"] > 0.5


@pytest.mark.filterwarnings("ignore:`:FutureWarning")
def test_batches_that_serve_several_steps_are_found(tmp_path):
    """Two steps on each batch, an accumulation of two: TRL itself says which weights sampled them."""
    settings = KEPT | dict(max_steps=5, gradient_accumulation_steps=2, num_iterations=2, save_strategy="no")
    trainer = sampling_trainer("grpo", tmp_path, settings=settings)
    sampled, own = [], trainer._generate_and_score_completions
    monkey = lambda inputs: sampled.append(trainer.state.global_step) or own(inputs)  # noqa: E731
    trainer._generate_and_score_completions = monkey
    trainer.train()
    assert sampled == [0, 2, 4]
    for step in range(6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    run = recorded_run(tmp_path)
    assert {c.step: c.rollouts.step for c in run.checkpoints if c.rollouts is not None} == {0: 1, 2: 3, 4: 5}
    schedule = Schedule(steps_per_generation=2, num_iterations=2, accumulation=2)
    assert recorded_run(tmp_path, schedule=schedule) == run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`:FutureWarning")
def test_measured_changes_of_the_example_are_those_that_trl_logged(tmp_path):
    """Entropies of single checkpoints are TRL's own; changes agree with their differences, and add up to the whole."""
    run = grpo_run.train(tmp_path / "run", steps=4)
    options = "--temperature 1 --append-eos --max-new-tokens 33 --skip-parameters --update-tokens --max-grad-norm 1"
    assert main(["replay", str(run), "--out", str(tmp_path / "out"), *options.split()]) == 0
    content = json.loads((tmp_path / "out" / "replay.json").read_text())
    rows, found = content["steps"], content["totals"]
    assert found["unusable"] == 0 and len(rows) == 4
    for row in rows[:-1]:
        assert row["entropy_after"] == pytest.approx(row["logged_entropy_after"], abs=1e-3)
        logged = row["logged_entropy_after"] - row["logged_entropy_before"]
        assert abs(row["measured"] - logged) < 4 * np.hypot(row["entropy_after_stderr"], row["entropy_before_stderr"])
        assert abs(row["predicted_quadratic"] - row["measured"]) < 4 * row["error_stderr"] + 0.2 * abs(row["measured"])
    assert abs(found["difference"]) < 4 * found["difference_stderr"]
    state = json.loads((run / "checkpoint-4/trainer_state.json").read_text())
    length = {entry["step"]: entry["completions/mean_length"] for entry in state["log_history"] if "entropy" in entry}
    for past, row in itertools.pairwise(rows):  # the optimizer's state is known, so the step is the one TRL took
        lost = round(length[row["step_after"]] * past["n_rollouts"]) - past["n_tokens"]
        # A text has lost special tokens that were sampled: rare ones, with large gradients.
        assert 0 <= lost < 10 and row["update_cosine"] > (0.9 if lost else 0.999)
        assert lost or abs(row["update_unexplained"]) < 0.02 * abs(row["update_tokens"])
