import json

import numpy as np
import pytest

from dentropy import PackedBatch


class Tokenizer:
    """One token per character (its code point); start token 1, end token 2."""

    bos_token, eos_token_id = "<s>", 2

    def encode(self, text, add_special_tokens):
        if "\N{SNOWMAN}" in text:
            raise Exception("Missing [UNK] token from the vocabulary")  # as the tokenizers library does
        body = [1, *self.encode(text[3:], False)] if text.startswith("<s>") else [ord(c) for c in text]
        return [1, *body] if add_special_tokens else body

    def decode(self, ids):
        return "".join({1: "<s>", 2: "</s>"}.get(t, chr(t)) for t in ids)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        return [1, *(ord(c) for m in messages for c in m["content"])]


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_lists_are_packed_in_order():
    batch = PackedBatch.from_lists(
        [[5, 6], [7], [5, 6]], [[1, 2, 3], [], [4]], group=["a", "b", "a"], reward=[1, 0, 0.5]
    )
    assert batch.tokens.tolist() == [5, 6, 1, 2, 3, 7, 5, 6, 4]
    assert batch.offsets.tolist() == [0, 5, 6, 9] and batch.response_offsets.tolist() == [0, 3, 3, 4]
    assert batch.offsets is batch.offsets  # a sum over all rollouts for each of them would be quadratic
    assert (len(batch), batch.n_tokens, batch.n_groups) == (3, 4, 2)
    assert batch.group.tolist() == [0, 1, 0] and batch.reward.tolist() == [1, 0, 0.5]
    assert [batch.prompt(i) for i in range(3)] == [[5, 6], [7], [5, 6]]
    assert [batch.response(i) for i in range(3)] == [[1, 2, 3], [], [4]]
    assert PackedBatch.from_lists([[1], [1]], [[2], [3]]).group.tolist() == [0, 1]


def test_padded_layout_equals_lists():
    prompts, responses = [[5, 6], [7]], [[[1, 2], [3]], [[4], [8, 9, 9]]]
    sequences, masks = np.zeros((2, 2, 6), int), np.zeros((2, 2, 6), int)
    for b in range(2):
        for g in range(2):
            real = prompts[b] + responses[b][g]
            start = 3 - len(prompts[b])
            sequences[b, g, start : start + len(real)] = real
            masks[b, g, start : start + len(real)] = 1
    padded = PackedBatch.from_padded(sequences, masks, [3, 3], [[2, 1], [1, 3]])
    lists = PackedBatch.from_lists([prompts[0]] * 2 + [prompts[1]] * 2, responses[0] + responses[1], group=[0, 0, 1, 1])
    for column in ("tokens", "prompt_lens", "response_lens", "group"):
        assert getattr(padded, column).tolist() == getattr(lists, column).tolist()


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(sequences=np.zeros((2, 6), int)), "sequences"),
        (dict(attention_masks=np.ones((1, 2, 5), int)), "attention_masks"),
        (dict(attention_masks=np.array([[[0, 1, 1, 0, 1, 1]] * 2])), "attention_masks"),
        (dict(prompt_lens=[3, 3]), "prompt_lens"),
        (dict(gen_lens=[[1]]), "gen_lens"),
        (dict(gen_lens=[[1, 4]]), "gen_lens"),
        (
            dict(gen_lens=[[1, 1]]),
            r"attention_masks\[0\]\[1\]: 0 in the response or 1 after it, expected 1 at 3:4, then 0",
        ),
        (dict(attention_masks=np.array([[[1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]]])), "padding on the left"),
    ],
)
def test_padded_layout_refuses_what_does_not_fit(change, named):
    good = dict(
        sequences=np.ones((1, 2, 6), int),
        prompt_lens=[3],
        gen_lens=[[1, 2]],
        attention_masks=np.array([[[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]]),
    )
    assert len(PackedBatch.from_padded(**good)) == 2
    with pytest.raises(ValueError, match=named):
        PackedBatch.from_padded(**(good | change))


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(prompts=[], responses=[]), "prompts: empty"),
        (dict(prompts=[[1]], responses=[]), "responses: 0"),
        (dict(prompts=[[1], []], responses=[[1], [1]]), r"prompts\[1\]: empty"),
        (dict(prompts=[[1]], responses=[[]]), "responses: all are empty"),
        (dict(prompts=[[1]], responses=[[-3]]), r"responses\[0\]: token id -3"),
        (dict(prompts=[[1.5]], responses=[[1]]), r"prompts\[0\]: float64"),
        (dict(prompts=[1], responses=[[1]]), r"prompts\[0\]"),
        (dict(prompts=[[1]], responses=[[1]], group=[0, 1]), "group: 2 labels"),
        (dict(prompts=[[1]], responses=[[1]], group=[[0]]), "group"),
        (dict(prompts=[[1]], responses=[[1]], reward=[float("nan")]), r"reward\[0\]: nan"),
        (dict(prompts=[[1]], responses=[[1]], reward=[1, 2]), "reward: shape"),
        (dict(prompts=[[1]], responses=[[1]], reward=["high"]), "reward: could not convert"),
        (dict(prompts=[[1]], responses=[[1]], temperature=0), "temperature: 0"),
    ],
)
def test_lists_refuse_bad_input_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        PackedBatch.from_lists(**arguments)


def test_vocabulary_check_names_the_rollout():
    batch = PackedBatch.from_lists([[1], [1], [1]], [[2, 3], [9], [4]])
    batch.check_vocabulary(10)
    with pytest.raises(ValueError, match="rollout 1: token id 9 is outside the vocabulary, expected ids below 9"):
        batch.check_vocabulary(9)


def test_json_lines_round_trip(tmp_path):
    batch = PackedBatch.from_lists([[72, 105]] * 2, [[33, 2], [63]], group=[7, 7], reward=[0.1, 1], temperature=0.7)
    batch.to_jsonl(tmp_path / "e.jsonl", Tokenizer())
    assert json.loads((tmp_path / "e.jsonl").read_text().splitlines()[0])["response"] == "!</s>"
    again = PackedBatch.from_jsonl(tmp_path / "e.jsonl")
    for column in ("tokens", "prompt_lens", "response_lens", "group", "reward"):
        assert getattr(again, column).tolist() == getattr(batch, column).tolist()
    assert again.temperature == 0.7


def test_trl_and_verl_dumps_are_read_and_equal_prompts_are_one_group(tmp_path):
    trl = write(
        tmp_path / "trl.jsonl",
        {"step": 3, "prompt": "a", "completion": "bc", "accuracy": 1.0, "advantage": 0.5},
        {"step": 3, "prompt": "<s>a", "completion": "d", "accuracy": 0.0, "advantage": -0.5},
        "",
    )
    with pytest.warns(UserWarning, match="no response ends with the end token"):
        batch = PackedBatch.from_jsonl(trl, Tokenizer())
    assert batch.prompt(0) == batch.prompt(1) == [1, 97]  # one start token, whether or not the text has it
    assert batch.response(0) == [98, 99] and batch.advantage.tolist() == [0.5, -0.5] and batch.n_groups == 1
    assert batch.reward is None
    verl = write(
        tmp_path / "verl.jsonl",
        {"input": "a", "output": "b", "gts": "b", "score": 1.0, "step": 1},
        {"input": "b", "output": "", "gts": "b", "score": 0.0, "step": 1},
    )
    batch = PackedBatch.from_jsonl(verl, Tokenizer(), append_eos=True)
    assert [batch.response(i) for i in range(2)] == [[98, 2], [2]]
    assert batch.reward.tolist() == [1, 0] and batch.n_groups == 2


def test_chat_messages_go_through_the_template(tmp_path):
    path = write(tmp_path / "chat.jsonl", {"prompt": [{"role": "user", "content": "hi"}], "completion": "yo"})
    assert PackedBatch.from_jsonl(path, Tokenizer()).prompt(0) == [1, 104, 105]


GOOD = {"prompt_ids": [1], "response_ids": [2]}


@pytest.mark.parametrize(
    "rows, named",
    [
        ([], "no rollouts"),
        ([GOOD, "{broken"], "line 2: broken JSON"),
        (["", GOOD, "", "[1]"], "line 4: a JSON list"),
        ([{"response_ids": [1]}], "line 1: only response_ids, expected one of prompt_ids, prompt, input"),
        ([{"prompt_ids": [1], "response_ids": [2.5]}], "line 1: response_ids: .2.5., expected a list of token ids"),
        ([{"prompt": "a", "response_ids": [2]}], "line 1: prompt: text without a tokenizer"),
        ([GOOD | {"reward": 1}, GOOD], "line 2: no reward"),
        ([GOOD | {"temperature": 0.5}, GOOD], "line 2: temperature 1.0"),
        ([GOOD | {"group": [1]}], "group"),
        ([GOOD | {"prompt_ids": []}], r"prompts\[0\]: empty"),
    ],
)
def test_json_lines_refuse_bad_input_by_line(tmp_path, rows, named):
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match=named) as error:
        PackedBatch.from_jsonl(path)
    assert "bad.jsonl" in str(error.value)


def test_text_the_tokenizer_refuses_names_the_line(tmp_path):
    path = write(tmp_path / "e.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "\N{SNOWMAN}"})
    with pytest.raises(ValueError, match="line 2: response: the tokenizer refuses it .Missing"):
        PackedBatch.from_jsonl(path, Tokenizer())


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    (tmp_path / "e.jsonl").write_bytes(b'{"prompt_ids": [1], "response_ids": [2]}\n\xff\xfe\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        PackedBatch.from_jsonl(tmp_path / "e.jsonl")


def test_files_that_are_not_there_or_not_json_lines(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        PackedBatch.from_jsonl(tmp_path / "nowhere.jsonl")
    (tmp_path / "completions.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="to_json"):
        PackedBatch.from_jsonl(tmp_path / "completions.parquet")
