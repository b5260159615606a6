import json

import numpy as np
import pytest
import torch
from models import VOCAB, random_model
from scipy.stats import chisquare
from transformers import GenerationConfig

from dentropy import PackedBatch, Policy, measure, sample
from dentropy.rollouts import sampling
from dentropy.rollouts.sampling import end_tokens, read_prompts, without_end

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture
def policy():
    return Policy(random_model("llama"))


def nasty_settings(**changes):
    """Settings of the kind that checkpoints ship; any of them left on changes the distribution drawn from."""
    return GenerationConfig(
        **(
            dict(
                do_sample=True,
                top_k=1,
                top_p=0.3,
                min_p=0.5,
                repetition_penalty=2.0,
                no_repeat_ngram_size=1,
                temperature=0.1,
                suppress_tokens=[3, 4, 5],
                min_new_tokens=4,
                renormalize_logits=True,
                max_length=4,
                eos_token_id=2,
            )
            | changes
        )
    )


@torch.no_grad()
def greedy(model, prompt, n, ends=()):
    """Greedy decoding without generate, cache or padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n and not (len(ids) > len(prompt) and ids[-1] in ends):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_softmax_whatever_the_checkpoint_says(temperature):
    """With more tokens in the vocabulary than the 50 of the top-k that `generate` would fill in."""
    policy = Policy(random_model("llama", vocab_size=80))
    policy.model.generation_config = nasty_settings()
    batch = sample(policy, [[5, 6, 7]], per_prompt=20_000, max_new_tokens=1, temperature=temperature, batch_size=20_000)
    drawn = np.bincount([batch.response(i)[0] for i in range(len(batch))], minlength=80)
    with torch.no_grad():
        logits = policy.model(torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    p = torch.softmax(logits / temperature, -1).numpy()
    assert chisquare(drawn, p / p.sum() * drawn.sum()).pvalue > 1e-3
    assert batch.temperature == temperature


def test_whole_rollouts_are_on_policy_whatever_the_checkpoint_says(policy):
    policy.model.generation_config = nasty_settings()
    batch = sample(policy, PROMPTS, per_prompt=100, max_new_tokens=12, temperature=0.8)
    sums = measure(policy, batch)
    balance = sums.logp + sums.entropy  # its mean is 0 on samples of the very policy
    assert abs(balance.mean()) < 4 * balance.std() / len(batch) ** 0.5
    assert {3, 4, 5} <= {token for i in range(len(batch)) for token in batch.response(i)}  # none is suppressed


def test_settings_mode_and_random_state_come_back(policy):
    settings = policy.model.generation_config = nasty_settings()
    policy.model.train()
    policy.model.model.layers[0].eval()
    before, modes = torch.get_rng_state(), [module.training for module in policy.model.modules()]
    seen = []

    def fail(rollouts, tokens):
        seen.append(policy.model.training)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sample(policy, PROMPTS, per_prompt=2, max_new_tokens=3, progress=fail)
    sample(policy, PROMPTS, per_prompt=2, max_new_tokens=3)
    assert seen == [False]
    assert policy.model.generation_config is settings and settings.to_dict() == nasty_settings().to_dict()
    assert [module.training for module in policy.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_fixes_the_draw(policy):
    torch.manual_seed(7)
    draws = [sample(policy, PROMPTS, per_prompt=4, max_new_tokens=8, seed=seed).tokens for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_and_batches_change_nothing_and_the_order_is_that_of_the_prompts(name):
    policy = Policy(random_model(name))
    # so cold that sampling is greedy, and greedy decoding can be done by hand
    batch = sample(policy, PROMPTS, per_prompt=2, max_new_tokens=6, temperature=1e-4, batch_size=4, eos_token_id=[])
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2]
    for i in range(len(batch)):
        assert batch.prompt(i) == PROMPTS[i // 2]
        assert batch.response(i) == greedy(policy.model, PROMPTS[i // 2], 6)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_that_go_on_when_others_have_ended_are_what_they_would_be_alone(name, cached, monkeypatch):
    policy, prompts = Policy(random_model(name)), [*PROMPTS, [6], [7, 8], [12, 3]]
    alone = [greedy(policy.model, prompt, 8) for prompt in prompts]
    ends = [row[2] for row in alone[:3]] + [alone[3][4]]  # so some end after three tokens
    alone = [greedy(policy.model, prompt, 8, ends) for prompt in prompts]
    assert len({len(row) for row in alone}) > 1
    calls, generate = [], policy.model.generate
    monkeypatch.setattr(sampling, "FEW", 2)
    monkeypatch.setattr(policy.model, "generate", lambda *a, **k: calls.append(k) or generate(*a, **k))
    if not cached:
        monkeypatch.setattr(sampling, "_of_rows", lambda cache, rows: None)
    batch = sample(policy, prompts, per_prompt=1, max_new_tokens=8, temperature=1e-4, eos_token_id=ends)
    assert [batch.response(i) for i in range(len(batch))] == alone
    assert len(calls) > 1 and all(bool({"cache", "past_key_values"} & set(call)) == cached for call in calls[1:])


def test_the_end_token_is_kept_and_nothing_after_it(policy):
    # pad and end token are one, as in many checkpoints
    policy.model.generation_config = nasty_settings(eos_token_id=2, pad_token_id=2)
    batch = sample(policy, PROMPTS, per_prompt=60, max_new_tokens=30)
    ended = 0
    for i in range(len(batch)):
        response = batch.response(i)
        assert 2 not in response[:-1] and 1 <= len(response) <= 30
        assert response[-1] == 2 or len(response) == 30
        ended += response[-1] == 2
    assert 0 < ended < len(batch)


def test_several_end_tokens(policy):
    policy.model.generation_config = nasty_settings(eos_token_id=[2, 17])
    assert end_tokens(policy) == (2, 17)
    batch = sample(policy, PROMPTS, per_prompt=60, max_new_tokens=30)
    last = {batch.response(i)[-1] for i in range(len(batch)) if batch.response_lens[i] < 30}
    assert last == {2, 17}
    assert not any({2, 17} & set(batch.response(i)[:-1]) for i in range(len(batch)))


def test_end_tokens_can_be_given_or_switched_off(policy):
    def lengths(ends):
        return sample(policy, PROMPTS, per_prompt=20, max_new_tokens=12, eos_token_id=ends).response_lens

    assert (lengths([]) == 12).all()
    assert (lengths(5) < 12).any()
    assert (lengths(list(range(VOCAB))) == 1).all()


def test_without_end_tokens_of_its_own_a_model_runs_to_the_limit():
    policy = Policy(random_model("llama", eos_token_id=None))
    assert end_tokens(policy) == ()
    assert (sample(policy, PROMPTS, per_prompt=5, max_new_tokens=7).response_lens == 7).all()


def test_rollouts_without_an_end_token_are_counted():
    batch = PackedBatch.from_lists([[5]] * 5, [[7, 2], [2, 7], [2], [], [17]])
    assert without_end(batch, (2,)) == 3 and without_end(batch, (2, 17)) == 2 and without_end(batch, (9,)) == 5
    assert without_end(batch, ()) is None


def test_progress_counts_every_rollout_and_token(policy):
    calls = []
    batch = sample(
        policy,
        PROMPTS,
        per_prompt=5,
        max_new_tokens=9,
        batch_size=4,
        progress=lambda rollouts, tokens: calls.append((rollouts, tokens)),
    )
    assert len(calls) == 4
    assert tuple(map(sum, zip(*calls, strict=True))) == (15, batch.n_tokens)


@pytest.mark.parametrize(
    "prompts, changes, message",
    [
        ([], {}, "prompts: none, expected at least one"),
        ([[5], []], {}, r"prompts\[1\]: empty"),
        ([[5], [VOCAB]], {}, rf"prompts\[1\]: token id {VOCAB} is outside the vocabulary"),
        ([[5], [-1]], {}, r"prompts\[1\]: token id -1 is outside the vocabulary"),
        (["17="], {}, r"prompts\[0\].*expected a flat sequence of token ids"),
        ([[0.5]], {}, r"prompts\[0\].*expected a flat sequence of token ids"),
        ([[5]], {"per_prompt": 0}, "per_prompt: 0, expected at least 1"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens: 0, expected at least 1"),
        ([[5]], {"batch_size": 0}, "batch_size: 0, expected at least 1"),
        ([[5]], {"temperature": 0.0}, "temperature: 0.0, expected a positive number"),
        ([[5]], {"temperature": float("nan")}, "temperature: nan, expected a positive number"),
        ([[5]], {"max_new_tokens": 64}, "64 positions"),
    ],
)
def test_bad_input_is_refused(policy, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        sample(policy, prompts, **({"per_prompt": 1, "max_new_tokens": 2} | changes))


class TestReadPrompts:
    @pytest.fixture
    def tokenizer(self):
        from dentropy.demo.train import build_tokenizer

        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '=' if add_generation_prompt }}"
        return tokenizer

    def test_ids_text_and_chat_messages(self, tmp_path, tokenizer):
        path = tmp_path / "prompts.jsonl"
        lines = [
            {"prompt_ids": [3, 4]},
            {"prompt": "17="},
            {"prompt": [{"role": "user", "content": "1"}, {"role": "user", "content": "7"}]},
        ]
        path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
        ids = tokenizer.convert_tokens_to_ids(["1", "7", "="])
        assert read_prompts(path, tokenizer) == [[3, 4], ids, ids]

    @pytest.mark.parametrize(
        "text, message",
        [
            ("", "no prompts"),
            ('{"prompt_ids": [3]}\n{"prompt_ids"', "line 2: broken JSON"),
            ("[3, 4]", "line 1: a JSON list, expected an object"),
            ('{"text": "17="}', "line 1: only text, expected one of prompt_ids, prompt"),
            ('{"prompt": "17="}', "line 1: prompt: text without a tokenizer"),
            ('{"prompt_ids": "17="}', "line 1: prompt_ids: '17=', expected a list of token ids"),
        ],
    )
    def test_bad_files_are_refused(self, tmp_path, text, message):
        path = tmp_path / "prompts.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            read_prompts(tmp_path / "none.jsonl")
