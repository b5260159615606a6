"""What a folder or a list is taken for."""

import json

import pytest

from dentropy.experiment.judges import judged_steps
from dentropy.experiment.recorded_run import recorded_run


def folders(place, *names):
    for name in names:
        (place / name).mkdir(parents=True)


def test_a_run_of_verl(tmp_path):
    """The dump of a step was sampled by the weights before it."""
    folders(tmp_path, "run/global_step_10/actor", "run/global_step_9/actor", "dumps")
    for step in (9, 10, 11):
        (tmp_path / f"dumps/{step}.jsonl").touch()
    run = recorded_run(tmp_path / "run", rollouts=tmp_path / "dumps")
    assert [(c.step, c.path.parts[-2:], c.rollouts.path.name) for c in run.checkpoints] == [
        (9, ("global_step_9", "actor"), "10.jsonl"),
        (10, ("global_step_10", "actor"), "11.jsonl"),
    ]
    (tmp_path / "dumps/11.jsonl").unlink()
    (step,) = judged_steps(recorded_run(tmp_path / "run", rollouts=tmp_path / "dumps"))
    # Fresh ones answer prompts of a dump that did not make the step.
    assert step.by == "fresh rollouts" and step.rollouts.path.name == "9.jsonl"
    with pytest.raises(ValueError, match=r"rollouts: not given, .* verl \(--rollouts\)"):
        recorded_run(tmp_path / "run")


def test_a_run_of_prime_rl(tmp_path):
    folders(tmp_path, *(f"weights/step_{step}" for step in (2, 4, 6)), *(f"token_exports/step_{s}" for s in (3, 5, 6)))
    run = recorded_run(tmp_path, lag=1)
    assert [c.rollouts and c.rollouts.path.name for c in run.checkpoints] == ["step_3", "step_5", None]
    assert [c.rollouts and c.rollouts.path.name for c in recorded_run(tmp_path, lag=2).checkpoints] == [
        None,
        "step_6",
        None,
    ]
    assert [step.by for step in judged_steps(recorded_run(tmp_path, fresh=True))] == ["fresh rollouts"] * 2
    with pytest.raises(ValueError, match="lag: -1, expected at least 0"):
        recorded_run(tmp_path, lag=-1)


def test_without_a_lag_a_checkpoint_of_prime_rl_is_judged_by_the_first_export_after_it(tmp_path):
    """It made none of the steps until there, and no other checkpoint is judged by it."""
    folders(tmp_path, *(f"weights/step_{s}" for s in (2, 4, 6, 8)), *(f"token_exports/step_{s}" for s in (1, 2, 4, 9)))
    judges = [c.rollouts and c.rollouts.path.name for c in recorded_run(tmp_path).checkpoints]
    assert judges == ["step_4", None, None, "step_9"]


def adapter(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "init_lora_weights": True} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_adapters_of_trl_began_at_their_base_model(tmp_path):
    for step in (1, 2):
        adapter(tmp_path / f"checkpoint-{step}")
    run = recorded_run(tmp_path)
    assert [c.step for c in run.checkpoints] == [0, 1, 2] and str(run.checkpoints[0].path) == "some/base"
    assert "checkpoint 0 is some/base, the base model" in run.notes[0]
    for other in (dict(base_model_name_or_path="other/base"), dict(init_lora_weights="pissa"), dict(peft_type="IA3")):
        adapter(tmp_path / "checkpoint-2", **other)  # of which it cannot be said
        assert [c.step for c in recorded_run(tmp_path).checkpoints] == [1, 2]
    adapter(tmp_path / "checkpoint-2")
    folders(tmp_path, "checkpoint-0")
    assert [c.step for c in recorded_run(tmp_path).checkpoints] == [0, 1, 2] and recorded_run(tmp_path).notes == ()


def test_a_list_in_toml_is_one_in_json(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[[checkpoints]]\npath = "a"\nstep = 0\nrollouts = "held_out.jsonl"\nmade_update = false\n'
        '[[checkpoints]]\npath = "b"\nstep = 5\nentropy = 1.5\n'
    )
    entries = [
        {"path": "a", "step": 0, "rollouts": "held_out.jsonl", "made_update": False},
        {"path": "b", "step": 5, "entropy": 1.5},
    ]
    (tmp_path / "run.json").write_text(json.dumps({"checkpoints": entries}))
    found = [recorded_run(tmp_path / name).checkpoints for name in ("run.toml", "run.json")]
    assert found[0] == found[1] and found[0][1].logged_entropy == 1.5 and found[0][0].path == tmp_path / "a"


@pytest.mark.parametrize(
    "content, said",
    [
        ({}, "no list `checkpoints`"),
        ({"checkpoints": [1, 2]}, "checkpoint 1: int, expected path and step"),
        ({"checkpoints": [{"path": "a"}]}, "checkpoint 1: no step"),
        ({"checkpoints": [{"path": "a", "step": True}]}, "checkpoint 1: step: True"),
        ({"checkpoints": [{"path": "a", "step": 1, "rolouts": "b"}]}, "'rolouts' is unknown"),
        ({"checkpoints": [{"path": "a", "step": -1}]}, "checkpoint 1: step: -1"),
        ({"checkpoints": [{"path": "a", "step": 1, "entropy": 10**400}]}, "checkpoint 1: entropy: 1000"),
        ({"checkpoints": [], "temperature": 1.0}, "'temperature' is unknown"),
        ({"checkpoints": [{"path": "a", "step": 1}]}, "1 checkpoint in"),
        ({"checkpoints": [{"path": "a", "step": 1}, {"path": "b", "step": 1}]}, "expected increasing ones"),
    ],
)
def test_bad_lists_are_refused(tmp_path, content, said):
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^run: .*{said}"):
        recorded_run(tmp_path / "run.json")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^run: .*no such folder"):
        recorded_run(tmp_path / "none")
    with pytest.raises(ValueError, match=r"^run: .*no checkpoint-\*, global_step_\* or weights/step_\*"):
        recorded_run(tmp_path)
    folders(tmp_path, "checkpoint-1", "checkpoint-2")
    with pytest.raises(ValueError, match="no rollouts, expected some, for their prompts"):
        judged_steps(recorded_run(tmp_path))


def test_logs_that_an_evaluation_wrote_over_judge_nothing(tmp_path):
    folders(tmp_path, "checkpoint-1", "checkpoint-2", "completions")
    history = [{"step": 2, "eval_loss": 0.5}, {"step": 2, "entropy": 1.0}, {"step": 3, "entropy": 0.5}]
    (tmp_path / "checkpoint-2/trainer_state.json").write_text(json.dumps({"log_history": history}))
    for step in (1, 2, 3):
        row = {"prompt": "a", "completion": str(step), "advantage": 0.0, "step": step}
        (tmp_path / f"completions/completions_{step:05d}.jsonl").write_text(json.dumps(row) + "\n")
    run = recorded_run(tmp_path)
    assert [c.rollouts and c.rollouts.step for c in run.checkpoints] == [None, 3] and "step 2 left out" in run.notes[0]
    # An entry is about one step where the step before has one too.
    assert [c.logged_entropy for c in run.checkpoints] == [None, 0.5]
