"""The recorder in the real trainers: it logs what it should, and training goes on as without it."""

import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trainers import SMALL, fingerprint, plain_trainer, sampling_trainer, tiny_model
from transformers import TrainerCallback

import dentropy
from dentropy import Policy, importance, measure
from dentropy.experiment.step_watch import StepWatch
from dentropy.integrations import next_rollouts
from dentropy.integrations.transformers import EntropyForecast

pytestmark = [
    pytest.mark.filterwarnings("ignore:`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:model. weights are torch.bfloat16, measured on"),
    # A pass in the trainer's autocast would differ from the float32 one, and fall back to the model's own head.
    pytest.mark.filterwarnings("error:policy. "),
]
KEYS = {"entropy", "predicted_delta", "measured_delta", "ess_fraction", "verdict", "realized_fraction"}
KEYS |= {"length", "length_predicted_delta", "length_measured_delta", "kl_predicted", "kl_measured"}
REWARD = {"reward", "reward_predicted_delta", "reward_measured_delta"}
LORA = dict(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


class Tracker(TrainerCallback):
    """What a tracker would send, as transformers' own do it, in on_log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


class Watched(TrainerCallback):
    """Fingerprints around the recorder: placed before it and behind it."""

    def __init__(self):
        self.seen = {}

    def _look(self, event, model, optimizer):
        self.seen.setdefault(event, []).append(fingerprint(model, getattr(optimizer, "optimizer", optimizer)))

    def on_pre_optimizer_step(self, args, state, control, *, model, optimizer, **_):
        self._look("before", model, optimizer)

    def on_optimizer_step(self, args, state, control, *, model, optimizer, **_):
        self._look("after", model, optimizer)


def recorded(trainer) -> list[dict]:
    """What the recorder put into log_history, one entry for each record, without the prefix, and the step."""
    entries = [entry for entry in trainer.state.log_history if "dentropy/entropy" in entry]
    return [
        {
            key.removeprefix("dentropy/"): value
            for key, value in entry.items()
            if key == "step" or key.startswith("dent")
        }
        for entry in entries
    ]


def run(kind, folder, *, every=1, attach=True, **more):
    """A trainer of that kind after train(), with the recorder."""
    trainer = plain_trainer(folder, **more) if kind == "plain" else sampling_trainer(kind, folder, **more)
    if attach:
        given = dict(prompts=[[5, 6], [7]], max_new_tokens=6) if kind == "plain" else {}
        EntropyForecast.attach(trainer, every, **SMALL | given)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Ten steps of GRPO without the recorder."""
    trainer = run("grpo", tmp_path_factory.mktemp("alone"), attach=False, settings=dict(max_steps=10))
    return fingerprint(trainer.model, trainer.optimizer.optimizer)


def test_ten_steps_of_grpo_are_the_same_with_it_bit_for_bit(tmp_path, alone):
    trainer = run("grpo", tmp_path, every=4, settings=dict(max_steps=10))
    assert fingerprint(trainer.model, trainer.optimizer.optimizer) == alone
    entries = recorded(trainer)
    assert [entry["step"] for entry in entries] == [1, 4, 8]
    assert all(set(entry) >= KEYS | REWARD and entry["realized_fraction"] == 1.0 for entry in entries)
    totals = np.cumsum([[entry["predicted_delta"], entry["measured_delta"]] for entry in entries], axis=0)
    assert np.allclose([[entry["predicted_total"], entry["measured_total"]] for entry in entries], totals)


@pytest.mark.parametrize(
    "more", [dict(peft_config=LoraConfig(**LORA)), dict(settings=dict(bf16=True))], ids=["lora", "autocast"]
)
def test_a_step_is_the_same_with_adapters_and_in_autocast(tmp_path, more):
    found = []
    for attach in (False, True):
        trainer = run(
            "grpo", tmp_path, attach=attach, **more | dict(settings=dict(max_steps=1) | more.get("settings", {}))
        )
        found.append(fingerprint(trainer.model, trainer.optimizer.optimizer))
    assert found[0] == found[1]
    (entry,) = recorded(trainer)
    assert set(entry) >= KEYS | REWARD and entry["realized_fraction"] == 1.0


class Failing:
    """The policy's passes, one of which fails after it has drawn from generators of training."""

    def __init__(self, monkeypatch, error):
        self.calls, self.at, self.error, self.score = 0, None, error, Policy.score
        monkeypatch.setattr(Policy, "score", lambda policy, *given, **more: self(policy, *given, **more))

    def __call__(self, policy, *given, **more):
        self.calls += 1
        if self.calls == self.at:
            torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
            raise self.error("stop")
        return self.score(policy, *given, **more)


def test_ten_steps_are_the_same_where_a_forecast_fails_in_the_middle(tmp_path, monkeypatch, alone):
    failing = Failing(monkeypatch, ValueError)
    trainer = sampling_trainer("grpo", tmp_path, settings=dict(max_steps=10))
    recorder = EntropyForecast.attach(trainer, 5, **SMALL)
    rollouts = recorder._rollouts

    def second_record(args, number, *given):
        failing.at = failing.calls + 1 if number == 5 else None
        return rollouts(args, number, *given)

    monkeypatch.setattr(recorder, "_rollouts", second_record)
    with pytest.warns(UserWarning, match="the record of step 5 failed: stop"):
        trainer.train()
    assert fingerprint(trainer.model, trainer.optimizer.optimizer) == alone
    assert [(entry["step"], entry.get("failed")) for entry in recorded(trainer)] == [(1, None), (10, 1)]


@pytest.mark.parametrize("after,event", [(2, "before"), (6, "after")])
def test_an_interrupt_in_a_forecast_leaves_all_as_it_was(tmp_path, monkeypatch, after, event):
    failing = Failing(monkeypatch, KeyboardInterrupt)
    trainer = sampling_trainer("grpo", tmp_path, settings=dict(max_steps=10))
    EntropyForecast.attach(trainer, 4, **SMALL)
    first = Watched()
    trainer.callback_handler.callbacks.insert(0, first)
    init = StepWatch.__init__

    def watching(*given, **more):
        failing.at = failing.calls + after if len(first.seen["before"]) == 4 else None
        init(*given, **more)

    monkeypatch.setattr(StepWatch, "__init__", watching)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 3 and len(first.seen["after"]) == 3 + (event == "after")
    assert fingerprint(trainer.model, trainer.optimizer.optimizer) == first.seen[event][-1]


@pytest.mark.parametrize("kind", ["rloo", "plain"])
def test_other_trainers(tmp_path, kind):
    trainer = run(kind, tmp_path, settings=dict(max_steps=2))
    entries = recorded(trainer)
    assert [entry["step"] for entry in entries] == [1, 2] and all(set(entry) >= KEYS for entry in entries)
    assert ("next_batch/step" in entries[1]) == (kind == "rloo")


def test_bf16_weights_lose_a_part_and_are_left_alone_at_every_event(tmp_path):
    trainer = sampling_trainer(
        "grpo", tmp_path, model=tiny_model(torch.bfloat16), settings=dict(max_steps=1, learning_rate=2e-4)
    )
    EntropyForecast.attach(trainer, 1, **SMALL)
    first, last = Watched(), Watched()
    trainer.callback_handler.callbacks.insert(0, first)
    trainer.add_callback(last)
    trainer.train()
    assert all(0 < entry["realized_fraction"] < 0.999 for entry in recorded(trainer))
    assert first.seen == last.seen and len(first.seen["after"]) == 1


def test_trackers_get_the_keys_where_it_is_attached(tmp_path, quick):
    """Trackers of report_to come first in a trainer; without a trainer at hand the recorder comes behind them."""
    trainer = sampling_trainer("grpo", tmp_path, settings=dict(max_steps=1))
    before = Tracker()
    trainer.callback_handler.callbacks.insert(0, before)
    EntropyForecast.attach(trainer, **SMALL)
    trainer.train()
    with_keys = [logs for logs in before.logs if "dentropy/measured_delta" in logs]
    assert len(with_keys) == 1 and "loss" in with_keys[0]
    assert with_keys[0]["dentropy/entropy"] == recorded(trainer)[0]["entropy"]
    with pytest.raises(ValueError, match="trainer: it has an EntropyForecast"):
        EntropyForecast.attach(trainer)


def test_it_works_without_arguments_among_the_callbacks(tmp_path):
    trainer = run("grpo", tmp_path, attach=False, callbacks=[EntropyForecast()], settings=dict(max_steps=1))
    assert [entry["step"] for entry in recorded(trainer)] == [1]


def test_the_rollouts_are_fresh_ones_of_the_trainers_temperature(tmp_path, monkeypatch):
    """Never those that made the step, and the trainer's next ones judge the step before."""
    batches, backward = [], []
    init, back = StepWatch.__init__, StepWatch.look_back_by

    def watching(self, watched, optimizer, batch, **kwargs):
        batches.append((batch, [part["completion_ids"].tolist() for part in trainer._buffered_inputs]))
        init(self, watched, optimizer, batch, **kwargs)

    def judging(self, batch):
        backward.append((batch, back(self, batch)))
        with self._watched.policy() as policy:
            now = measure(policy, batch, keep_tokens=True)
        with self._watched.policy(self._before) as policy:
            past = measure(policy, batch, keep_tokens=True)
        assert backward[-1][1].delta == -importance(now, past, weights="prefix").delta
        return backward[-1][1]

    monkeypatch.setattr(StepWatch, "__init__", watching)
    monkeypatch.setattr(StepWatch, "look_back_by", judging)
    trainer = sampling_trainer("grpo", tmp_path, settings=dict(max_steps=2))
    EntropyForecast.attach(trainer, 1, **SMALL)
    trainer.train()
    assert [batch.temperature for batch, _ in batches] == [1.5] * 2 and len(batches[0][0]) == 12
    assert len({tuple(batch.tokens.tolist()) for batch, _ in batches}) == 2
    assert [len(batch) for batch, _ in backward] == [8]
    for (judged, _), (_, sampled) in zip(backward, batches[1:], strict=True):
        rows = [row for part in sampled for row in part]
        assert all(row[: len(judged.response(i))] == judged.response(i) for i, row in enumerate(rows))


def test_a_batch_that_serves_two_steps_judges_the_last_before_it(tmp_path, quick):
    trainer = run("grpo", tmp_path, settings=dict(max_steps=3, num_iterations=2))
    judged = [
        entry["dentropy/next_batch/step"] for entry in trainer.state.log_history if "dentropy/next_batch/step" in entry
    ]
    assert judged == [2]


def test_rollouts_of_the_record_before_judge_a_step_too(tmp_path, quick, monkeypatch):
    judged, back = [], quick.look_back_by
    monkeypatch.setattr(quick, "look_back_by", lambda step, batch: judged.append((step, batch)) or back(step, batch))
    trainer = sampling_trainer("grpo", tmp_path, settings=dict(max_steps=4))
    EntropyForecast.attach(trainer, 2, **SMALL, earlier=True)
    trainer.train()
    entries = recorded(trainer)
    assert [(entry["step"], entry.get("earlier/step")) for entry in entries] == [(1, None), (2, 1.0), (4, 2.0)]
    assert entries[1]["earlier/measured_delta"] == 0.1 and entries[1]["earlier/verdict"] == 2
    own = [(step, batch) for step, batch in judged if len(batch) == len(step.batch)]  # others are the trainer's
    assert len(own) == 2 and own[1][1] is own[0][0].batch


@pytest.mark.slow
def test_every_few_records_a_run_folder(tmp_path):
    trainer = sampling_trainer("grpo", tmp_path, settings=dict(max_steps=2))
    EntropyForecast.attach(trainer, 1, **SMALL | dict(report_every=2))
    (tmp_path / "dentropy" / "step-000002").mkdir(parents=True)  # of a run before
    trainer.train()
    folder = tmp_path / "dentropy" / "step-000002-2"
    assert sorted(path.name for path in (tmp_path / "dentropy").iterdir()) == ["step-000002", folder.name]
    content = json.loads((folder / "results.json").read_text())
    assert content["attribution"]["parameters"] and (folder / "report.html").is_file()
    assert content["base_entropy"] == pytest.approx(recorded(trainer)[1]["entropy"], rel=1e-6)


def test_a_learning_rate_of_zero_and_rewards_that_are_equal(tmp_path):
    """Warm-up begins at 0, and a batch without a difference in reward has no gradient: nothing moves, all is logged."""
    trainer = run("grpo", tmp_path, settings=dict(max_steps=1, warmup_steps=5))
    (entry,) = recorded(trainer)
    assert entry["predicted_delta"] == 0.0 and "slope" not in entry
    assert abs(entry["measured_delta"]) < 1e-15  # sums of the same numbers, rounded


def test_gradients_that_are_not_finite_are_not_recorded(tmp_path, quick):
    class Spoilt(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **_):
            if state.global_step == 0:
                next(model.parameters()).grad.fill_(float("inf"))
                self.saved = [p.detach().clone() for p in model.parameters()]

        def on_optimizer_step(self, args, state, control, *, model, **_):
            if state.global_step == 0:
                for p, value in zip(model.parameters(), self.saved, strict=True):
                    p.data.copy_(value)

    trainer = sampling_trainer("grpo", tmp_path, settings=dict(max_steps=2, optim="sgd"))
    EntropyForecast.attach(trainer, 10, **SMALL)
    trainer.callback_handler.callbacks.insert(0, Spoilt())
    with pytest.warns(UserWarning, match="the record of step 1 failed: _NotFinite: gradients are not finite"):
        trainer.train()
    assert [(entry["step"], entry["failed"]) for entry in recorded(trainer)] == [(2, 1)]


def test_a_first_record_that_fails_stops_training(tmp_path, monkeypatch):
    trainer = sampling_trainer("grpo", tmp_path)
    EntropyForecast.attach(trainer, 1, **SMALL | dict(prompts=[[99]]))
    with pytest.raises(ValueError, match=r"prompts\[0\]: token id 99 is outside the vocabulary"):
        trainer.train()


@pytest.mark.parametrize(
    "given,said",
    [
        (dict(prompts=[]), "prompts: none"),
        (dict(max_new_tokens=64), "max_new_tokens: 64 after a prompt"),
        (dict(every=0), "every: 0, expected at least 1"),
    ],
)
def test_bad_settings(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        trainer = sampling_trainer("grpo", tmp_path)
        EntropyForecast.attach(trainer, **SMALL | given)
        trainer.train()


def test_what_the_trainer_must_say(tmp_path, monkeypatch):
    for given, said in (
        (dict(prompts=["3="]), "max_new_tokens: not given"),
        (dict(max_new_tokens=3), "no column 'prompt'"),
    ):
        trainer = plain_trainer(tmp_path)
        EntropyForecast.attach(trainer, **SMALL | given)
        with pytest.raises(ValueError, match=said):
            trainer.train()
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match="EntropyForecast: 2 processes"):
        trainer.train()


@pytest.mark.slow
def test_totals_go_on_where_training_is_resumed(tmp_path):
    saved = dict(save_strategy="steps", save_steps=1)
    first = run("grpo", tmp_path, settings=dict(max_steps=1) | saved)
    second = sampling_trainer("grpo", tmp_path, settings=dict(max_steps=2) | saved)
    EntropyForecast.attach(second, 1, **SMALL)
    second.train(resume_from_checkpoint=True)
    a, b = recorded(second)
    assert a == recorded(first)[0]
    assert b["measured_total"] == pytest.approx(a["measured_delta"] + b["measured_delta"])


def test_rollouts_that_judge_no_step():
    class Cut:
        top_p, temperature = 0.9, 1.0

    assert "top_p=0.9" in next_rollouts.not_the_policys(Cut())
    assert next_rollouts.packed([{"tool_mask": None}], 1.0) is None


def test_chat_prompts_are_encoded_as_the_trainer_does(tmp_path, monkeypatch):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "17"}]] * 4})
    trainer = sampling_trainer("grpo", tmp_path, dataset=dataset, settings=dict(max_steps=1))
    trainer.processing_class.chat_template = template
    found = []
    monkeypatch.setattr(
        dentropy.integrations.transformers,
        "drawn_by_ranks",
        lambda policy, prompts, **_: found.extend(prompts) or 1 / 0,
    )
    EntropyForecast.attach(trainer, **SMALL)
    trainer.reward_funcs = [lambda prompts, completions, **_: [float(len(prompts))] * len(completions)]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert {tuple(prompt) for prompt in found} == {tuple(trainer.processing_class.encode("17="))}
    assert {tuple(p) for p in found} == {tuple(trainer._tokenize_prompts(dataset["prompt"][:1])[0][0])}
