import math
import random
from pathlib import Path

import pytest
import torch
import transformers

import dentropy.demo
from dentropy.demo import task, train

FOLDER = Path(dentropy.demo.__file__).parent / "policy"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()


def test_the_shipped_folder_is_complete_and_small():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5e6


def test_the_model_is_a_llama_of_one_to_two_million_parameters(model, tokenizer):
    assert type(model) is transformers.LlamaForCausalLM
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all()
    assert model.config.vocab_size == len(tokenizer) == len(task.CHARACTERS) + 2
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_the_stored_weights_are_bfloat16():
    from safetensors import safe_open

    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}


def test_tokenizer_has_one_token_per_character_and_round_trips(tokenizer):
    rng = random.Random(0)
    for prompt in task.prompts(200, seed=0):
        text = prompt + task.random_expression(int(prompt[:-1]), rng)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == list(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.encode("7=7" + tokenizer.eos_token)[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["1 2", "a", "7\n", "(7)"])
def test_tokenizer_refuses_unknown_characters(tokenizer, text):
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode(text)


def test_sampled_answers_earn_a_middling_reward_and_differ_in_length(model, tokenizer):
    torch.manual_seed(0)
    prompts = task.prompts(256, seed=0)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=task.MAX_ANSWER + 1
    )
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = [task.reward(prompt, answer) for prompt, answer in zip(prompts, answers)]
    assert 0.4 < sum(rewards) / 256 < 0.8
    right = {len(answer) for answer, reward in zip(answers, rewards) if reward}
    assert len(right) >= 8, right
    order = sorted(range(256), key=lambda i: len(answers[i]))
    short, long = ([rewards[i] for i in half] for half in (order[:128], order[128:]))
    assert sum(long) < sum(short) - 12, "longer answers fail more often"


def test_generation_config_samples_from_the_whole_vocabulary(model):
    config = model.generation_config
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 1.0, 0, 1.0)
    assert config.max_new_tokens == task.MAX_ANSWER + 1


def test_training_script_learns_and_writes_a_policy_that_loads(tmp_path, capsys):
    out = tmp_path / "policy"
    train.main(
        [
            "--out",
            str(out),
            "--steps",
            "30",
            "--rows",
            "4",
            "--hidden",
            "32",
            "--layers",
            "1",
            "--lr",
            "1e-2",
            "--eval",
            "16",
        ]
    )
    printed = capsys.readouterr().out
    assert "step 30/30" in printed and "16 answers: mean reward" in printed
    shipped = {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert {path.name for path in out.iterdir()} == shipped
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    unseen = train.training_batch(train.build_tokenizer(), 64, random.Random(99))
    with torch.no_grad():
        loss = model(**unseen, use_cache=False).loss.item()
    assert loss < 0.8 * math.log(model.config.vocab_size)  # log V: knowing nothing


def test_training_is_reproducible(tmp_path):
    options = dict(steps=3, rows=2, hidden=32, layers=1, lr=1e-2)
    tokenizer = train.build_tokenizer()
    first, again, other = (train.train(tokenizer, **options, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.allclose(first[name], again[name]) for name in first)
    assert not all(torch.allclose(first[name], other[name]) for name in first)


def examples_of(batch):
    """The rows cut where the positions restart; padding left out."""
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"]):
        starts = (positions == 0).nonzero().flatten().tolist() + [len(ids)]
        for start, end in zip(starts, starts[1:]):
            if (labels[start:end] != -100).any():
                yield ids[start:end], labels[start:end]


def test_training_batch_holds_whole_examples_and_scores_answers_only():
    tokenizer = train.build_tokenizer()
    batch = train.training_batch(tokenizer, 32, random.Random(5))
    scored = 0
    for ids, labels in examples_of(batch):
        prompt, answer = tokenizer.decode(ids).split("=")
        assert answer.endswith(train.END)
        assert task.reward(prompt + "=", answer.removesuffix(train.END)) == 1.0
        assert tokenizer.decode(labels[labels != -100]) == answer
        scored += len(ids)
    assert (batch["input_ids"] != tokenizer.pad_token_id).sum() == scored
    assert scored > 0.75 * batch["input_ids"].numel()


def test_examples_of_a_row_do_not_see_each_other(model):
    batch = train.training_batch(train.build_tokenizer(), 8, random.Random(6))
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        alone = [
            (model(input_ids=ids[None], labels=labels[None]).loss, (labels != -100).sum())
            for ids, labels in examples_of(batch)
        ]
    mean = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(packed, mean, rtol=1e-5, atol=0)


def test_training_script_refuses_a_folder_with_files(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path)])
    assert stop.value.code == 2 and "expected a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
