import pytest
from letter_files import letters, read

ROW = {"prompt_ids": [5, 6], "response_ids": [7, 8, 2]}


@pytest.mark.parametrize(
    "masks, kept",
    [
        ({"response_mask": [1, 1, 1]}, 3),
        ({"response_mask": [1, 1, 0]}, 2),
        ({"completion_mask": [True, False, False]}, 1),
        ({"loss_mask": [0, 0, 1, 1, 0]}, 2),  # over prompt and response
        ({"attention_mask": [1, 1, 1, 1, 0]}, 2),
        ({"token_loss_mask": [1.0, 1.0, 1.0]}, 3),
        ({"tool_mask": [1, 0, 0], "loss_mask": [1, 1, 0]}, 1),
        ({"is_masked": [False, False, True]}, 2),
        ({"is_masked_high": False, "sample_loss_mask": 1, "prompt_mask": [1, 1], "env_mask": None}, 3),
    ],
)
def test_a_mask_of_the_whole_response_or_of_padding_behind_it(tmp_path, masks, kept):
    batch, said = read(tmp_path, ROW | masks, ROW)
    assert batch.response(0) == [7, 8, 2][:kept] and batch.prompt(0) == [5, 6] and batch.response(1) == [7, 8, 2]
    cut = 3 - kept
    assert said == [] if not cut else f"{cut} masked tokens behind responses were cut off" in said[0]


@pytest.mark.parametrize(
    "name, value",
    [
        ("response_mask", [1, 0, 1]),  # the reply of a tool
        ("tool_mask", [0, 1, 1]),
        ("loss_mask", [0, 0, 0]),  # as trainers mask truncated responses
        ("loss_mask", [0, 1, 1, 1, 1]),
        ("attention_mask", [0, 1, 1, 1, 0]),
        ("completion_mask", [1, 1]),
        ("assistant_masks", [1, 0.5, 1]),
        ("assistant_masks", [[1, 1, 1]]),
        ("assistant_masks", "111"),
        ("is_masked", [1, 1, 1]),
        ("is_masked", True),
        ("sample_loss_mask", 0),
        ("prompt_mask", [0, 1]),
        ("prompt_mask", [1]),
    ],
)
def test_any_other_mask_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"line 2: {name}: .*, expected "):
        read(tmp_path, ROW, ROW | {name: value})


def test_beside_text_a_mask_can_only_be_of_ones(tmp_path):
    row = {"prompt": "a", "response": "bc</s>"}
    batch, said = read(tmp_path, row | {"response_mask": [1] * 7}, tokenizer=letters())
    assert len(batch.response(0)) == 3 and said == []
    with pytest.raises(ValueError, match="line 1: response_mask: .*, expected 1 at all response tokens"):
        read(tmp_path, row | {"response_mask": [1, 1, 0]}, tokenizer=letters())
