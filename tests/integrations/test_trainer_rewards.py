"""Rewards of fresh rollouts by the trainer's own functions: called as TRL calls them, forecast as by hand."""

import copy
import functools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from trainers import SMALL, sampling_trainer, tiny_model

from dentropy import PackedBatch
from dentropy.experiment.step_watch import StepWatch
from dentropy.integrations import transformers
from dentropy.integrations.trainer_rewards import TrainerRewards, not_here
from dentropy.integrations.transformers import EntropyForecast

pytestmark = pytest.mark.filterwarnings("ignore:`:FutureWarning")
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def weights_of(model) -> dict:
    return {name: p.detach().double() for name, p in model.named_parameters()}


def by_hand(before, after, batch, reward, temperature) -> tuple[float, float]:
    """The derivative of the mean reward along after − before, and its change: the mean over prompts, two rollouts each,
    of the sample covariance of reward and score, or weight, by plain float64 passes over single rollouts."""
    probed = tiny_model(torch.float64).eval()

    def logps(eta):
        moved = {name: before[name] + eta * (after[name] - before[name]) for name in before}
        probed.load_state_dict(moved, strict=False)
        found = []
        for i in range(len(batch)):
            prompt, response = batch.prompt(i), batch.response(i)
            logits = probed(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
            found.append(float(torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum()))
        return np.array(found)

    def mean_covariance(x):
        return float(np.mean((reward[::2] - reward[1::2]) * (x[::2] - x[1::2]) / 2))

    with torch.no_grad():
        h = 1e-2  # norms are taken in float32
        return mean_covariance((logps(h) - logps(-h)) / (2 * h)), mean_covariance(np.exp(logps(1.0) - logps(0.0)))


def test_the_forecast_is_that_of_the_functions_called_as_the_trainer_calls_them(tmp_path, monkeypatch):
    calls, batches, weights = [], [], []

    def length(prompts, completions, completion_ids, target, **given):
        given["log_metric"]("seen", 1.0)
        given["log_extra"]("seen", [0] * len(prompts))
        calls.append(dict(given, prompts=prompts, completions=completions, ids=completion_ids, target=target))
        return [len(ids) + t for ids, t in zip(completion_ids, target, strict=True)]

    def digits(completions, **_):
        return [None if text == "" else sum(c.isdigit() for c in text) for text in completions]

    init = StepWatch.__init__

    def watching(self, watched, optimizer, batch, **settings):
        batches.append(batch), weights.append(weights_of(trainer.model))
        init(self, watched, optimizer, batch, **settings)

    monkeypatch.setattr(StepWatch, "__init__", watching)
    rows = {"prompt": ["17=", "23=", "5=", "9="], "target": [3, 1, 4, 1], "completion": ["x"] * 4}
    trainer = sampling_trainer(
        "grpo",
        tmp_path,
        dataset=Dataset.from_dict(rows),
        settings=dict(max_steps=1, learning_rate=2e-3, reward_weights=[0.5, 2.0]),
        functions=[length, digits],
    )
    EntropyForecast.attach(trainer, **SMALL)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "dentropy/reward" in entry]
    (batch,), (own, ours) = batches, calls

    assert own.keys() == ours.keys() and entry["seen"] == 1.0
    assert all(type(own[name]) is type(ours[name]) for name in ("prompts", "completions", "ids", "target"))
    assert ours["trainer_state"] is trainer.state
    target = dict(zip(rows["prompt"], rows["target"], strict=True))
    assert ours["target"] == [target[prompt] for prompt in ours["prompts"]]
    assert ours["ids"] == [batch.response(i) for i in range(len(batch))]
    assert ours["completions"] == trainer.processing_class.batch_decode(ours["ids"], skip_special_tokens=True)
    assert [trainer.processing_class.encode(p) for p in ours["prompts"]] == [batch.prompt(i) for i in range(len(batch))]

    lengths = [len(ids) + target[prompt] for ids, prompt in zip(ours["ids"], ours["prompts"], strict=True)]
    reward = 0.5 * np.array(lengths) + 2.0 * np.array([sum(map(str.isdigit, text)) for text in ours["completions"]])
    assert np.array_equal(batch.reward, reward) and len(set(reward)) > 2
    predicted, measured = by_hand(*weights, weights_of(trainer.model), batch, reward, temperature=1.5)
    assert entry["dentropy/reward"] == pytest.approx(reward.mean())
    assert entry["dentropy/reward_predicted_delta"] == pytest.approx(predicted, rel=1e-3)
    assert entry["dentropy/reward_measured_delta"] == pytest.approx(measured, rel=1e-3)
    assert abs(predicted / measured - 1) > 0.01 and entry["dentropy/reward_measured_delta_stderr"] > 0


def trainer_of(functions, tokenizer=None, **more):
    weights = torch.ones(len(functions))
    return SimpleNamespace(
        reward_funcs=functions, reward_weights=weights, processing_class=tokenizer, state=None, **more
    )


class Words:
    def batch_decode(self, ids, skip_special_tokens):
        return ["".join("abcdefghij"[i] for i in row) for row in ids]


BATCH = PackedBatch.from_lists([[1], [1], [2]], [[3, 4], [5], [6]], group=[0, 0, 1])
ROWS = [{"prompt": "b", "n": [7]}, {"prompt": "c", "n": [8]}]


def test_chats_have_messages_and_what_a_function_changes_is_its_own():
    rows = [{"prompt": [{"role": "user", "content": text}], "n": [1]} for text in "bc"]

    def spoiling(prompts, completions, n, **_):
        assert [len(prompt) for prompt in prompts] == [1, 1, 1]
        assert completions == [[{"role": "assistant", "content": text}] for text in ("de", "f", "g")]
        for prompt, number in zip(prompts, n, strict=True):
            prompt.append("more"), number.append(2)
        return torch.tensor([1.0, 2.0, 3.0])

    before = copy.deepcopy(rows)
    assert TrainerRewards(trainer_of([spoiling], Words())).of(BATCH, rows).tolist() == [1.0, 2.0, 3.0]
    assert rows == before


def test_none_of_all_functions_is_no_number():
    first, second = (lambda **_: [1.0, None, None]), (lambda **_: [1.0, None, 2.0])
    found = TrainerRewards(trainer_of([first, second], Words())).of(BATCH, ROWS)
    assert found.tolist()[::2] == [2.0, 2.0] and np.isnan(found[1])


@pytest.mark.parametrize(
    "function,said",
    [
        (lambda **_: [1.0], "reward_funcs: <lambda> gave 1 rewards, expected 3"),
        (lambda **_: {}["x"], "reward_funcs: <lambda> failed on fresh rollouts: KeyError: 'x'"),
    ],
)
def test_a_function_that_fails_is_named(function, said):
    with pytest.raises(ValueError, match=said):
        TrainerRewards(trainer_of([function], Words())).of(BATCH, ROWS)


async def slow(**_):
    return []


class Slow:
    async def __call__(self, **_):
        return []


@pytest.mark.parametrize(
    "trainer,said",
    [
        (trainer_of([len, torch.nn.Linear(1, 1)]), "Linear is a model"),
        (trainer_of([slow]), "slow is async"),
        (trainer_of([functools.partial(Slow())]), "partial is async"),
        (trainer_of([len], tools=[len]), "made with tools"),
        (trainer_of([len], rollout_func=len), "made with rollout_func"),
        (trainer_of([len], SimpleNamespace(response_schema={})), "parses answers by a schema"),
        (trainer_of([len, functools.partial(len)], tools=[], rollout_func=None), None),
    ],
)
def test_what_rewards_are_not_to_be_had(trainer, said):
    found = not_here(trainer, {"prompt": [{"role": "user", "content": "17="}]})
    assert found is None if said is None else said in found


@pytest.fixture
def batches(quick, monkeypatch):
    """Those of the records."""
    found, init = [], transformers.StepWatch.__init__
    monkeypatch.setattr(
        transformers.StepWatch,
        "__init__",
        lambda self, watched, optimizer, batch, **settings: (
            found.append(batch) or init(self, watched, optimizer, batch, **settings)
        ),
    )
    return found


@pytest.mark.parametrize(
    "given,functions,said",
    [
        (dict(prompts=["3="]), None, "prompts= are not the training data's"),
        ({}, [lambda completions, **_: [None] + [1.0] * (len(completions) - 1)], "give None for 1 of 12"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*returned None")
def test_one_warning_says_why_there_is_no_forecast(tmp_path, batches, given, functions, said):
    trainer = sampling_trainer("grpo", tmp_path, functions=functions, settings=dict(max_steps=2))
    EntropyForecast.attach(trainer, 1, **SMALL | given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    (message,) = [str(w.message) for w in caught if "EntropyForecast" in str(w.message)]
    assert message.startswith("EntropyForecast: no forecast of the reward: ") and said in message
    assert [batch.reward for batch in batches] == [None, None]


def test_functions_are_not_called_where_that_is_not_wanted(tmp_path, quick):
    calls = []
    trainer = sampling_trainer(
        "grpo", tmp_path, functions=[lambda prompts, **_: calls.append(0) or [1.0] * len(prompts)],
        settings=dict(max_steps=1),
    )  # fmt: skip
    EntropyForecast.attach(trainer, **SMALL, rewards=False)
    trainer.train()
    assert len(calls) == 1
