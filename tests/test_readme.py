import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trainer_files as files
from sharded_files import write_ranks

from dentropy import measure
from dentropy.cli import main
from dentropy.demo.run import POLICY, draw_rollouts, load_policy, load_tokenizer
from dentropy.experiment import figures

README = (Path(__file__).parents[1] / "README.md").read_text()
# Where each trainer leaves its files, as the README's commands name the places.
WRITTEN = {
    "TRL": ("RUN/completions/completions_00003.parquet", files.trl, files.as_parquet),
    "verl": ("DUMPS/3.jsonl", files.verl, files.as_json_lines),
    "prime-rl": ("RUN/token_exports/step_3/rank_0.jsonl", files.prime_rl, files.as_json_lines),
    "NeMo-RL": ("LOGS/train_data_step3.jsonl", files.nemo_rl, files.as_json_lines),
    "open-instruct": ("ROLLOUTS/run_rollouts_000000.jsonl", files.open_instruct, files.as_json_lines),
    "AReaL": ("RUN/rollout/3/0.jsonl", files.areal, files.as_json_lines),
    "slime": ("data_3.pt", files.slime, files.as_saved),
}


def test_python_examples_run_and_agree(capsys):
    """The README's blocks, one after the other: the pass through Policy and the loop by torch.func.jvp."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    for column, values in names["base"].columns().items():
        assert values == pytest.approx(getattr(names["sums"], column), rel=1e-3, abs=1e-3), column
    assert "predicted ΔH" in capsys.readouterr().out


def test_setup_is_two_commands():
    assert 'pip install -e ".[probe]" && dentropy demo' in README
    assert 'pip install -e ".[test]" && pytest' in README


def commands_of_trainers():
    """{trainer: its command}, with what stands for the options that all have."""
    others = re.search(r"`OTHERS` is\s+`(.*?)`", README, re.DOTALL)[1]
    found = re.findall(r"^- ([\w-]+),.*?`dentropy (probe [^`]*) OTHERS`", README, re.DOTALL | re.MULTILINE)
    return {trainer: f"{command} {others}".split() for trainer, command in found}


def test_every_trainer_has_a_command():
    assert list(commands_of_trainers()) == list(WRITTEN)


@pytest.mark.slow
def test_commands_for_trainers_run_and_agree(tmp_path, monkeypatch):
    """Rollouts of the demo's policy, written as each trainer would: each command sees the same ones."""
    policy, tokenizer = load_policy()
    drawn = draw_rollouts(policy, tokenizer, 3, 2, seed=0)
    drawn = drawn.take([i for i in range(len(drawn)) if drawn.response(i)[-1] == tokenizer.eos_token_id])
    rollouts = as_recorded(policy, drawn)
    with torch.no_grad():
        next(policy.model.parameters()).mul_(1.001)
    policy.model.save_pretrained(tmp_path / "NEXT_DIR")
    shutil.copytree(POLICY, tmp_path / "DIR")
    monkeypatch.setattr(files, "letters", load_tokenizer)
    monkeypatch.setattr(files, "STEP", 3)
    monkeypatch.chdir(tmp_path)
    drawn.to_jsonl("own.jsonl")
    probed = {"dentropy": run(["probe", "--rollouts", "own.jsonl", *commands_of_trainers()["slime"][3:]])}
    for trainer, words in commands_of_trainers().items():
        place, rows, write = WRITTEN[trainer]
        (tmp_path / trainer / place).parent.mkdir(parents=True)
        write(tmp_path / trainer / place, rows(rollouts))
        (tmp_path / trainer / place).with_name("STABLE").touch()
        for name in ("DIR", "NEXT_DIR"):
            (tmp_path / trainer / name).symlink_to(tmp_path / name)
        monkeypatch.chdir(tmp_path / trainer)
        probed[trainer] = run(words)
    assert {content["n_tokens"] for content in probed.values()} == {drawn.n_tokens}
    assert len({content["step_size"] for content in probed.values()}) == 1
    for trainer, content in probed.items():  # some record the sampler's log-probabilities: weights of 1, to rounding
        assert content["base_entropy"] == pytest.approx(probed["dentropy"]["base_entropy"], rel=1e-6), trainer


def as_recorded(policy, drawn):
    """Rollouts of the policy, with what it gave their tokens."""
    logp = np.minimum(measure(policy, drawn, keep_tokens=True).tokens.logp.double().numpy(), 0.0)
    logps = np.split(logp, drawn.response_offsets[1:-1])
    return [
        files.Rollout(
            *drawn.row(i), int(drawn.group[i]), float(drawn.reward[i]), [0.5] * len(logps[i]), logps[i].tolist()
        )
        for i in range(len(drawn))
    ]


def run(words):
    """The results of a command."""
    assert main(words) == 0
    content = json.loads(Path("run/results.json").read_text())
    shutil.rmtree("run")
    return content


def replays():
    """{trainer: its command}, and that of a list."""
    found = re.findall(
        r"^- ([\w-]+)[, ].*?`dentropy (replay [^`]*)`", README.partition("**A whole run.**")[2], re.S | re.M
    )
    return {trainer: command.split() for trainer, command in found}


def test_every_run_has_a_command():
    assert list(replays()) == ["TRL", "verl", "prime-rl", "anything"]


@pytest.mark.slow
def test_commands_for_runs_work_and_agree(tmp_path, monkeypatch):
    """Checkpoints 1 and 2 of the demo's policy and rollouts that the second sampled, as each trainer leaves them."""
    policy, tokenizer = load_policy()
    model = policy.model
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    drawn = draw_rollouts(policy, tokenizer, 6, 3, seed=0)
    drawn = drawn.take([i for i in range(len(drawn)) if drawn.response(i)[-1] == tokenizer.eos_token_id])
    rollouts = as_recorded(policy, drawn)
    monkeypatch.setattr(files, "letters", load_tokenizer)
    monkeypatch.setattr(figures, "FIGURES", {})
    places = {"TRL": "RUN/checkpoint-{}", "prime-rl": "RUN/weights/step_{}", "anything": "model-{}"}
    for step, source in ((2, model), (1, load_policy()[0].model)):
        for trainer, place in places.items():
            source.save_pretrained(tmp_path / trainer / place.format(step))
            tokenizer.save_pretrained(tmp_path / trainer / place.format(step))
        actor = tmp_path / "verl/RUN" / f"global_step_{step}" / "actor"
        actor.parent.mkdir(parents=True)
        write_ranks(source, actor)
        source.generation_config.save_pretrained(actor / "huggingface")
        tokenizer.save_pretrained(actor / "huggingface")
    found = {}
    for trainer, command in replays().items():
        monkeypatch.chdir(tmp_path / trainer)
        if trainer in WRITTEN:
            place, rows, write = WRITTEN[trainer]
            for step in (1, 2, 3) if trainer == "TRL" else (3,):
                monkeypatch.setattr(files, "STEP", step)
                path = Path(place.replace("00003", f"{step:05d}"))
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, rows(rollouts[3 - step :]))
                path.with_name("STABLE").touch()
        else:
            drawn.to_jsonl("2.jsonl")
            entry = '[[checkpoints]]\npath = "model-{0}"\nstep = {0}\n'
            Path("run.toml").write_text(entry.format(1) + entry.format(2) + 'rollouts = "2.jsonl"\n')
        assert main(command) == 0
        (row,) = json.loads(Path("REPLAY/replay.json").read_text())["steps"]
        assert row["judged_by"] == "next rollouts" and row["n_tokens"] == drawn.n_tokens
        found[trainer] = row["entropy_after"], row["measured"], row["predicted"]
    for trainer, values in found.items():
        assert values == pytest.approx(found["anything"], rel=1e-4), trainer
