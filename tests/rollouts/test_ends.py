import pytest
from letter_files import TURNS, ids, letters, read

EXTRA = ["<turn>", "<user>"]


def responses(batch):
    return [batch.response(i) for i in range(len(batch))]


@pytest.mark.parametrize(
    "settings, arguments, end",
    [
        ({}, {}, 2),  # no special token but start, end and the unknown: it can be no other
        ({}, {"end_tokens": [3]}, 3),
        ({}, {"end_tokens": 3}, 3),
        ({"extra": EXTRA}, {"end_tokens": [2]}, 2),
        ({"extra": EXTRA, "template": TURNS}, {"end_tokens": [2, 3]}, 3),
        ({"extra": EXTRA, "template": TURNS}, {"end_tokens": (3, 2)}, 3),
        ({"extra": EXTRA, "template": TURNS, "eos_token": "<turn>"}, {}, 3),
        ({"extra": EXTRA}, {"end_tokens": [2, 3], "append_eos": "<turn>"}, 3),
        ({"extra": EXTRA}, {"append_eos": "</s>"}, 2),
    ],
)
def test_the_end_token_that_the_policy_ends_turns_with_is_appended(tmp_path, settings, arguments, end):
    prompt = "<user>a" if "extra" in settings else "a"
    rows = [{"prompt": prompt, "response": text} for text in ("bc", "b")]
    batch, said = read(tmp_path, *rows, tokenizer=letters(**settings), **({"append_eos": True} | arguments))
    assert responses(batch) == [[*ids("bc"), end], [*ids("b"), end]]
    assert said == []


@pytest.mark.parametrize(
    "settings, arguments, named",
    [
        ({"extra": EXTRA}, {"end_tokens": [2, 3]}, "'</s>' or '<turn>'"),  # a generation config with two
        ({"extra": EXTRA}, {}, "'</s>' or '<turn>'"),  # the policy may have another than its tokenizer
        ({"extra": EXTRA, "template": TURNS}, {}, "'</s>' or '<turn>'"),  # template and tokenizer disagree
        ({"eos_token": None}, {}, "the tokenizer has no end token"),
        ({}, {"append_eos": "<nothing>"}, "'<nothing>' is no token"),
    ],
)
def test_an_end_token_that_cannot_be_told_is_asked_for(tmp_path, settings, arguments, named):
    arguments = {"append_eos": True} | arguments
    with pytest.raises(ValueError, match=f"append_eos: .*{named}.*, expected"):
        read(tmp_path, {"prompt": "a", "response": "b"}, tokenizer=letters(**settings), **arguments)


def test_what_was_cut_off_and_what_has_its_end_token_gets_none(tmp_path):
    texts = ["b", "bcd", "bc", "b</s>", "bcdef"]
    rows = [{"prompt": "a", "response": text} for text in texts]
    batch, said = read(tmp_path, *rows, tokenizer=letters(), append_eos=True, max_new_tokens=3)
    assert responses(batch) == [[*ids("b"), 2], ids("bcd"), [*ids("bc"), 2], [*ids("b"), 2], ids("bcdef")]
    assert said == []
    rows = [row | {"finish_reason": reason} for row, reason in zip(rows, ["stop", "length", "stop", "stop", "length"])]
    assert responses(read(tmp_path, *rows, tokenizer=letters(), append_eos=True)[0]) == responses(batch)


def test_a_cap_of_no_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens: 0, expected at least 1"):
        read(tmp_path, {"prompt": "a", "response": "b"}, tokenizer=letters(), append_eos=True, max_new_tokens=0)


def test_a_length_cap_that_nobody_named_is_suspected(tmp_path):
    rows = [{"prompt": "a", "response": text} for text in ("b", "bcd", "bce", "bc")]
    _, said = read(tmp_path, *rows, tokenizer=letters(), append_eos=True)
    assert len(said) == 1 and "2 responses share the longest length, 3 tokens" in said[0]
    for known in ({"max_new_tokens": 3}, {"max_new_tokens": 10}):
        assert read(tmp_path, *rows, tokenizer=letters(), append_eos=True, **known)[1] == []
    assert read(tmp_path, *rows[::2], rows[1], tokenizer=letters(), append_eos=True)[1] != []  # not hidden by order
    assert read(tmp_path, *rows[:2], tokenizer=letters(), append_eos=True)[1] == []
    told = [row | {"finish_reason": "stop"} for row in rows]
    assert read(tmp_path, *told, tokenizer=letters(), append_eos=True)[1] == []


@pytest.mark.parametrize("ends, said_of", [([2], "the end token 2"), ([2, 3], "one of the end tokens 2, 3")])
def test_token_ids_without_an_end_token_are_noticed(tmp_path, ends, said_of):
    rows = [{"prompt_ids": [5], "response_ids": response} for response in ([6, 7], [], [2, 8])]
    _, said = read(tmp_path, *rows, end_tokens=ends)
    assert len(said) == 1 and f"no response ends with {said_of}" in said[0]
    assert "1 of 3 responses go on after an end token" in said[0]
    rows[0]["response_ids"] = [6, ends[-1]]
    assert "no response ends" not in read(tmp_path, *rows, end_tokens=ends)[1][0]
    assert read(tmp_path, *rows)[1] == []  # without a policy nothing is known of its end tokens
