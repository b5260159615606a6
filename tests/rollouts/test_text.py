import pytest
from letter_files import TURNS, ids, letters, read

from dentropy.rollouts.sampling import read_prompts

USER = {"role": "user", "content": "ab"}


@pytest.mark.parametrize(
    "around, text, starts",
    [
        ("<s> $A </s>", "abc", [1]),
        ("$A </s>", "abc", []),
        ("<s> <s> $A </s> </s>", "abc", [1, 1]),
        ("<s> $A </s>", "<s>abc", []),  # the text brings its own
        ("<s> $A </s>", "abc</s>", [1]),  # and so it does here: an end token that is part of the prompt
        ("$A", "abc", []),
    ],
)
def test_only_start_tokens_are_added_to_prompts(tmp_path, around, text, starts):
    tokenizer = letters(single=around)
    expected = starts + tokenizer.encode(text, add_special_tokens=False)
    batch, _ = read(tmp_path, {"prompt": text, "response_ids": [7, 2]}, tokenizer=tokenizer)
    assert batch.prompt(0) == read_prompts(tmp_path / "rollouts.jsonl", tokenizer)[0] == expected


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>"])
def test_an_empty_prompt_is_the_start_token(tmp_path, around):
    batch, _ = read(tmp_path, {"prompt": "", "response_ids": [7, 2]}, tokenizer=letters(single=around))
    assert batch.prompt(0) == [1]


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([USER], [4, *ids("ab"), 3, 4]),
        ([USER, {"role": "assistant", "content": "c"}], [4, *ids("ab"), 3, 4, *ids("c")]),
        ([USER, {"role": "assistant", "content": ""}], [4, *ids("ab"), 3, 4]),
        ([USER, {"role": "assistant", "content": "c"}, USER], [4, *ids("ab"), 3, 4, *ids("c"), 3, 4, *ids("ab"), 3, 4]),
    ],
)
def test_a_closing_message_of_the_assistant_is_left_open(tmp_path, messages, expected):
    tokenizer = letters(template=TURNS, extra=["<turn>", "<user>"])
    batch, _ = read(tmp_path, {"prompt": messages, "response_ids": [7, 3]}, tokenizer=tokenizer)
    assert batch.prompt(0) == read_prompts(tmp_path / "rollouts.jsonl", tokenizer)[0] == expected


def test_a_trl_log_of_messages_is_read(tmp_path):
    """As TRL writes a conversation: both columns lists of messages, a column per reward function, the advantage."""
    tokenizer = letters(template=TURNS, extra=["<turn>", "<user>"])
    rows = [
        {
            "step": 3,
            "prompt": [USER],
            "completion": [{"role": "assistant", "content": content, "tool_calls": None}],
            "accuracy": 1.0,
            "advantage": advantage,
        }
        for content, advantage in (("cd", 0.5), ([{"type": "text", "text": "e"}], -0.5))
    ]
    batch, said = read(tmp_path, *rows, tokenizer=tokenizer, append_eos=True, end_tokens=[2, 3], max_new_tokens=5)
    assert [batch.response(i) for i in (0, 1)] == [[*ids("cd"), 3], [*ids("e"), 3]]
    assert batch.prompt(0) == [4, *ids("ab"), 3, 4] and batch.n_groups == 1
    assert batch.advantage.tolist() == [0.5, -0.5] and batch.reward is None and said == []


@pytest.mark.parametrize(
    "completion, named",
    [
        ([{"role": "assistant", "content": "c"}, {"role": "tool", "content": "d"}], "2 messages"),
        ([{"role": "user", "content": "c"}], "1 messages"),
        ([{"role": "assistant", "content": "c", "tool_calls": [{"name": "f"}]}], "with tool_calls"),
        ([{"role": "assistant", "content": "c", "reasoning_content": "d"}], "with reasoning_content"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "list, expected text"),
        ([], "0 messages"),
    ],
)
def test_a_completion_of_more_than_one_text_is_refused(tmp_path, completion, named):
    with pytest.raises(ValueError, match=f"line 1: completion: .*{named}"):
        read(tmp_path, {"prompt": "a", "completion": completion}, tokenizer=letters())


class TestLosses:
    def test_prompts_without_the_marks_of_the_chat_template(self, tmp_path):
        tokenizer = letters(template=TURNS, extra=["<turn>", "<user>"], eos_token="<turn>")
        marked = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
        unmarked = tokenizer.decode(tokenizer.encode(marked), skip_special_tokens=True)  # as verl writes it
        for append_eos in (False, True):
            _, said = read(
                tmp_path,
                *({"input": text, "output": "c", "finish_reason": "stop"} for text in (marked, unmarked, unmarked)),
                tokenizer=tokenizer,
                append_eos=append_eos,
            )
            assert len(said) == 1 and "2 of 3 prompts have none of the chat template's special tokens" in said[0]
            assert ("no response ends with the end token 3" in said[0]) == (not append_eos)  # one warning names all

    @pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"])
    def test_a_template_without_marks_loses_none(self, tmp_path, template):
        tokenizer = letters(template=template, extra=["<turn>"])
        _, said = read(tmp_path, {"prompt": "ab", "response": "c</s>"}, tokenizer=tokenizer)
        assert said == []

    @pytest.mark.parametrize("prompt, response, changed", [("ab", "cd", 0), ("Ab", "cd", 1), ("a\ufffd", "C?", 2)])
    def test_text_that_tokens_do_not_give_back_is_counted(self, tmp_path, prompt, response, changed):
        row = {"prompt": prompt, "response": response + "</s>"}
        _, said = read(tmp_path, row, tokenizer=letters(lowercase=True))
        assert said == [] if not changed else f"{changed} of 2 texts are not what their token ids decode to" in said[0]

    def test_ids_beside_text_tell_how_other_text_fares(self, tmp_path):
        tokenizer = letters(pad_token="ab")  # a longer token, which encoding prefers to a and b
        rows = [{"prompt_ids": ids(text), "prompt": text, "response": "c</s>"} for text in ("ab", "ac", "ad")]
        batch, said = read(tmp_path, *rows, tokenizer=tokenizer)
        assert batch.prompt(0) == ids("ab")  # ids are exact
        assert len(said) == 1 and "1 of 3 columns of token ids with text beside them change" in said[0]

    def test_exact_ids_lose_nothing_whatever_text_is_beside_them(self, tmp_path):
        row = {"prompt_ids": ids("ab"), "prompt": "AB", "response_ids": [7, 2], "response": "nothing of the kind"}
        _, said = read(tmp_path, row, tokenizer=letters(pad_token="ab"), end_tokens=[2])
        assert said == []
