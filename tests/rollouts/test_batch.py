import json
import os

import numpy as np
import pytest

from dentropy import PackedBatch
from dentropy.demo.run import load_tokenizer


class Tokenizer:
    """One token per character (its code point); start token 1, end token 2."""

    bos_token, bos_token_id, eos_token, eos_token_id, pad_token, unk_token = "<s>", 1, "</s>", 2, None, None
    all_special_tokens, added_tokens_decoder, chat_template = ["<s>", "</s>"], {}, None

    def encode(self, text, add_special_tokens):
        if "\N{SNOWMAN}" in text:
            raise Exception("Missing [UNK] token from the vocabulary")  # as the tokenizers library does
        body = [1, *self.encode(text[3:], False)] if text.startswith("<s>") else [ord(c) for c in text]
        return [1, *body] if add_special_tokens else body

    def decode(self, ids, **settings):
        return "".join({1: "<s>", 2: "</s>"}.get(t, chr(t)) for t in ids)

    def apply_chat_template(self, messages, add_generation_prompt, continue_final_message, return_dict):
        assert add_generation_prompt and not continue_final_message and not return_dict
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


def test_rollouts_are_taken_in_the_order_asked_for():
    prompts, responses = [[5, 6], [7], [5, 6]], [[1, 2, 3], [], [4]]
    batch = PackedBatch.from_lists(prompts, responses, group=[3, 8, 3], reward=[1, 0, 0.5], temperature=0.7)
    taken = batch.take(np.array([2, 0]))
    by_hand = PackedBatch.from_lists(
        [prompts[2], prompts[0]], [responses[2], responses[0]], group=[3, 3], reward=[0.5, 1], temperature=0.7
    )
    for column in ("tokens", "prompt_lens", "response_lens", "group", "reward", "temperature"):
        assert np.array_equal(getattr(taken, column), getattr(by_hand, column)), column
    assert PackedBatch.from_lists([[1]], [[2]]).take([0]).reward is None
    for rows in ([], [3], [-1, 0]):
        with pytest.raises(ValueError, match=r"rows: \["):
            batch.take(rows)


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
        (dict(prompts=[[1]], responses=[[1]], group=[float("nan")]), "group: labels of the kind of a list or NaN"),
        (dict(prompts=[[1]], responses=[[1]], temperature=True), "temperature: True"),
        (dict(prompts=[[1]], responses=[[1]], temperature=10**400), "temperature: 1000"),
        (dict(prompts=[[1]], responses=[[1]], reward=["0.5"]), "reward: <U3 values"),
        (dict(prompts=[[[1], [2, 3]]], responses=[[1]]), r"prompts\[0\]: no array"),
        (dict(prompts=[[1]], responses=[[1]], reward=[float("nan")]), r"reward\[0\]: nan"),
        (dict(prompts=[[1]], responses=[[1]], reward=[1, 2]), "reward: shape"),
        (dict(prompts=[[1]], responses=[[1]], reward=["high"]), "reward: <U4 values, expected one number"),
        (dict(prompts=[[1]], responses=[[1]], advantage=[float("inf")]), r"advantage\[0\]: inf"),
        (dict(prompts=[[1]], responses=[[1]], advantage=[[1, 2]]), r"advantage\[0\]: shape"),
        (dict(prompts=[[1]], responses=[[1]], advantage=[1, 2]), "advantage: shape"),
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
    batch = PackedBatch.from_lists(
        [[72, 105]] * 2, [[33, 2], [63]], group=[7, 7], reward=[0.1, 1], temperature=0.7, advantage=[-0.3, 2]
    )
    batch.to_jsonl(tmp_path / "e.jsonl", Tokenizer())
    assert json.loads((tmp_path / "e.jsonl").read_text().splitlines()[0])["response"] == "!</s>"
    again = PackedBatch.from_jsonl(tmp_path / "e.jsonl")
    for column in ("tokens", "prompt_lens", "response_lens", "group", "reward", "advantage"):
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
        ([GOOD | {"advantage": 1}, GOOD], "line 2: no advantage"),
        ([GOOD | {"group": [1]}], "group"),
        ([GOOD | {"prompt_ids": []}], "line 1: the prompt is empty, expected at least one token"),
        ([GOOD, GOOD | {"prompt_ids": [2**63]}], "line 2: prompt_ids: token id 9223372036854775808, expected"),
        ([GOOD, GOOD | {"response_ids": [3, 2**63]}], "line 2: response_ids: token id 9223372036854775808"),
        ([GOOD | {"response_ids": [-(2**63) - 1]}], "line 1: response_ids: token id -9223372036854775809"),
        ([GOOD | {"reward": 10**400}], "line 1: reward: 1000.*, expected a finite number"),
        ([GOOD | {"reward": "0.5"}], "line 1: reward: '0.5', expected a finite number"),
        ([GOOD | {"reward": float("nan")}], "line 1: reward: nan, expected a finite number"),
        ([GOOD | {"temperature": 10**400}], "line 1: temperature: 1000.*, expected a finite number"),
        ([GOOD, GOOD | {"temperature": True}], "line 2: temperature: True, expected a finite number"),
        ([GOOD | {"temperature": 1e-40}], "temperature: 1e-40, expected a positive number, from 1e-06"),
        ([GOOD | {"group": float("nan")}] * 2, "line 1: group: nan, expected an integer or text"),
        ([GOOD | {"group": True}], "line 1: group: True, expected an integer or text"),
        ([GOOD, '{"prompt_ids": ' + "[" * 100_000], "line 2: broken JSON .RecursionError"),
        ([GOOD, '{"prompt_ids": [' + "1" * 5000 + "]}"], "line 2: broken JSON"),
    ],
)
def test_json_lines_refuse_bad_input_by_line(tmp_path, rows, named):
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match=named) as error:
        PackedBatch.from_jsonl(path)
    assert "bad.jsonl" in str(error.value)


def test_text_the_tokenizer_refuses_names_the_line(tmp_path):
    path = write(tmp_path / "e.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "\N{SNOWMAN}"})
    with pytest.raises(ValueError, match=r"line 2: response: the tokenizer refuses it \(Exception: Missing"):
        PackedBatch.from_jsonl(path, Tokenizer())


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    (tmp_path / "e.jsonl").write_bytes(b'{"prompt_ids": [1], "response_ids": [2]}\n\xff\xfe\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        PackedBatch.from_jsonl(tmp_path / "e.jsonl")


def test_files_that_are_not_there_or_not_json_lines(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        PackedBatch.from_jsonl(tmp_path / "nowhere.jsonl")
    (tmp_path / "completions.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="Parquet, expected JSON lines .read_rollouts reads .*to_json"):
        PackedBatch.from_jsonl(tmp_path / "completions.parquet")


def test_integers_beyond_int64_are_labels_too(tmp_path):
    path = write(tmp_path / "e.jsonl", *(GOOD | {"group": 2**64 - label} for label in (59, 59, 1)))
    assert PackedBatch.from_jsonl(path).group.tolist() == [0, 0, 1]
    path = write(tmp_path / "e.jsonl", GOOD | {"reward": -(2**63) - 1})
    assert PackedBatch.from_jsonl(path).reward.tolist() == [-(2.0**63)]


def test_token_ids_do_not_wrap_around():
    for ids in (np.array([2**63], dtype=np.uint64), [2**63], [-1]):
        with pytest.raises(ValueError, match=r"responses\[0\]: "):
            PackedBatch.from_lists([[1]], [ids])


def test_byte_order_marks_are_read_or_refused_by_name(tmp_path):
    path = tmp_path / "e.jsonl"
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"):
        path.write_text(("\ufeff" if encoding[-3:] in ("-le", "-be") else "") + json.dumps(GOOD), encoding=encoding)
        if encoding == "utf-8-sig":
            assert PackedBatch.from_jsonl(path).response(0) == [2]
            continue
        with pytest.raises(ValueError, match=f"line 1: {encoding[:6].upper()} text, expected UTF-8"):
            PackedBatch.from_jsonl(path)


def test_a_pipe_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "e.jsonl")
    with pytest.raises(ValueError, match=r"e\.jsonl: is not a regular file, expected a file of JSON lines"):
        PackedBatch.from_jsonl(tmp_path / "e.jsonl")


def test_a_chat_template_that_refuses_names_the_line(tmp_path):
    path = write(tmp_path / "chat.jsonl", {"prompt": [{"role": "system"}], "response_ids": [2]})
    with pytest.raises(ValueError, match=r"line 1: prompt: the chat template refuses it .KeyError: 'content'"):
        PackedBatch.from_jsonl(path, Tokenizer())
    for template in ("{{ raise_exception('System role not supported') }}", "{{ messages[0].name.upper() }}", "{% if"):
        tokenizer = load_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="line 1: prompt: the chat template refuses it .*, expected messages"):
            PackedBatch.from_jsonl(path, tokenizer)
