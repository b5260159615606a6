"""Rows with a mask of generated tokens, in memory and as JSON lines."""

import json

import numpy as np
import pytest
from letter_files import letters, read

from dentropy import PackedBatch
from dentropy.rollouts.overlap import overlap
from dentropy.rollouts.sampling import without_end

ROWS, MASKS = [[5, 6, 7, 8, 9, 2, 4, 4], [5, 6], [3, 7, 2]], [[0, 0, 1, 0, 1, 1, 0, 0], [0, 0], [0, 1, 1]]
MASKED = {"token_ids": [5, 6, 7, 8, 2], "loss_mask": [0, 1, 1, 0, 1]}


def rows(**columns):
    return PackedBatch.from_rows(ROWS, MASKS, **columns)


def equal(one, other):
    names = ("tokens", "generated", "row_lens", "group", "temperature", "reward", "advantage", "sampler_logp")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_rows_keep_what_was_given_between_generated_tokens_and_nothing_behind_them():
    batch = rows()
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 2, 5, 6, 3, 7, 2]
    assert batch.row(0) == ([5, 6, 7, 8, 9, 2], [False, False, True, False, True, True])
    assert [batch.prompt(i) for i in range(3)] == [[5, 6], [5, 6], [3]]
    assert [batch.response(i) for i in range(3)] == [[7, 9, 2], [], [7, 2]]
    assert batch.response_lens.tolist() == [3, 0, 2] and batch.response_offsets.tolist() == [0, 3, 3, 5]
    assert batch.prompt_lens.tolist() == [2, 2, 1] and (batch.n_tokens, len(batch), batch.n_groups) == (5, 3, 3)
    assert without_end(batch, [2]) == 1 and batch.offsets.tolist() == [0, 6, 8, 11]


def test_prompts_and_responses_are_rows():
    columns = dict(group=[1, 1, 0], reward=[1, 0, 2], advantage=[1, 2, 3], temperature=0.5, sampler_logp=[-1.0] * 4)
    lists = PackedBatch.from_lists([[5, 6], [7], [5]], [[1, 2, 3], [], [4]], **columns)
    masks = [[0, 0, 1, 1, 1], [0], [0, 1]]
    assert equal(lists, PackedBatch.from_rows([[5, 6, 1, 2, 3], [7], [5, 4]], masks, **columns))


def test_numbers_for_each_token_come_packed_or_by_rollout():
    packed, nested = [-1.0, -2, -3, -4, -5], [[-1, -2, -3], [], np.array([-4.0, -5])]
    for values in (packed, nested):
        batch = rows(advantage=values, sampler_logp=values)
        assert batch.advantage.tolist() == batch.sampler_logp.tolist() == packed
    assert rows(advantage=[1, 2, 3]).advantage.tolist() == [1, 2, 3]
    taken = batch.take([2, 0])
    assert taken.advantage.tolist() == taken.sampler_logp.tolist() == [-4, -5, -1, -2, -3]
    assert taken.row(1) == batch.row(0) and taken.response_lens.tolist() == [2, 3]


def test_as_many_rollouts_as_tokens_leave_no_doubt_about_advantages():
    two = dict(token_ids=[[1], [1, 2, 3]], loss_mask=[[0], [0, 1, 1]])
    assert PackedBatch.from_rows(**two, advantage=[4, 5]).advantage.tolist() == [4, 5]
    with pytest.raises(ValueError, match="advantage: one per generated token, of which there are as many as rollouts"):
        PackedBatch.from_rows(**two, advantage=[[], [4, 5]])
    with pytest.raises(ValueError, match="advantage: one per generated token"):
        rows(advantage=[[1, 2, 3], [], [4, 5]]).take([1, 2])


def test_temperatures_are_one_number_where_they_are_equal():
    assert rows(temperature=[0.7] * 3).temperature == 0.7
    batch = rows(temperature=[0.7, 1, 0.7])
    assert batch.temperature.tolist() == batch.temperatures.tolist() == [0.7, 1, 0.7]
    assert batch.take([0, 2]).temperature == 0.7 and batch.take([1, 0]).temperature.tolist() == [1, 0.7]
    assert rows(temperature=0.7).temperatures.tolist() == [0.7] * 3


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(token_ids=[]), "token_ids: empty"),
        (dict(token_ids=[[], [1], [1]]), r"token_ids\[0\]: empty"),
        (dict(token_ids=[[1.5]] * 3), r"token_ids\[0\]: float64"),
        (dict(loss_mask=MASKS[:2]), "loss_mask: 2 masks for 3 rows"),
        (dict(loss_mask=[MASKS[0], [0], MASKS[2]]), r"loss_mask\[1\]: shape \(1,\), expected one flag .* 2 tokens"),
        (dict(loss_mask=[MASKS[0], MASKS[1], [0, 2, 1]]), r"loss_mask\[2\]: int64 values other than 0 and 1"),
        (dict(loss_mask=[MASKS[0], MASKS[1], [1, 1, 1]]), r"loss_mask\[2\]: 1 at the row's first token, which nothing"),
        (dict(loss_mask=[[0] * len(ids) for ids in ROWS]), "loss_mask: 0 at every token"),
        (dict(temperature=[1.0, 1.0]), "temperature: 2 of them, expected one per rollout, 3"),
        (dict(temperature=[1.0, 0.0, 1.0]), r"temperature\[1\]: 0.0, expected a positive number"),
        (dict(advantage=[1.0, 2.0]), r"advantage: shape \(2,\), expected one number per rollout .*\[5\]"),
        (dict(advantage=[[1, 2], [], [3, 4]]), r"advantage\[0\]: shape \(2,\), expected one number per generated"),
        (dict(sampler_logp=[-1.0] * 3), r"sampler_logp: shape \(3,\), expected one number per generated token, \[5\]"),
        (dict(sampler_logp=[[-1.0] * 5]), "sampler_logp: 1 lists of numbers, expected one per rollout, 3"),
        (dict(sampler_logp=[-1, -1, 0.2, -1, -1]), "sampler_logp: 0.2 at generated token 2, expected log-prob"),
        (dict(sampler_logp=[-1, float("-inf"), -1, -1, -1]), r"sampler_logp\[1\]: -inf, expected a finite"),
    ],
)
def test_rows_refuse_bad_input_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        PackedBatch.from_rows(**(dict(token_ids=ROWS, loss_mask=MASKS) | change))


@pytest.mark.parametrize("advantage", [[0.5, 1, -2], [[1, 2, 3], [], [4, 5.5]], None])
def test_json_lines_round_trip(tmp_path, advantage):
    logps = None if advantage is None else [-0.1, -2, 0, -3, -4]
    batch = rows(
        group=[7, 7, 3], reward=[0.1, 1, 2], temperature=[0.7, 1, 0.7], advantage=advantage, sampler_logp=logps
    )
    batch.to_jsonl(tmp_path / "rows.jsonl", letters())
    assert equal(PackedBatch.from_jsonl(tmp_path / "rows.jsonl"), batch)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert ["token_ids" in line for line in lines] == [True, False, False]
    assert lines[0]["loss_mask"] == [0, 0, 1, 0, 1, 1] and lines[2]["response_ids"] == [7, 2]


def test_lines_of_both_kinds_are_read_and_equal_prompts_are_one_group(tmp_path):
    plain = {"prompt_ids": [5], "response_ids": [6, 2]}
    batch, said = read(tmp_path, MASKED, plain, MASKED | {"loss_mask": [0, 1, 1, 0, 0], "attention_mask": [1] * 5})
    assert batch.group.tolist() == [0, 0, 0] and said == []
    assert [batch.response(i) for i in range(3)] == [[6, 7, 2], [6, 2], [6, 7]]
    assert len(batch.row(2)[0]) == 3


def test_numbers_of_a_cut_end_are_cut_with_it(tmp_path):
    row = {"prompt_ids": [5], "response_ids": [6, 2, 0], "response_mask": [1, 1, 0]}
    batch, _ = read(tmp_path, row | {"sampler_logp": [-1, -2, -9], "advantage": [1, 2, 9]})
    assert batch.sampler_logp.tolist() == [-1, -2] and batch.advantage.tolist() == [1, 2]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"token_ids": [5, "6"]}, "token_ids: .*, expected a list of token ids"),
        ({"token_ids": [], "loss_mask": []}, "token_ids: empty"),
        ({"loss_mask": [0, 1]}, "loss_mask: 2 values for 5 tokens"),
        ({"loss_mask": 1}, "loss_mask: 1 values for 5 tokens"),
        ({"loss_mask": [0, 1, 1, 0, 0.5]}, "loss_mask: .*, expected 0s and 1s"),
        ({"loss_mask": [1, 1, 1, 0, 1]}, "loss_mask: 1 at the first token, which nothing predicts"),
        ({"tool_mask": [1, 1, 1, 0, 1]}, "tool_mask: masks tokens beside loss_mask"),
        ({"sample_loss_mask": 0}, "sample_loss_mask: masks tokens beside loss_mask"),
        ({"advantage": [1, 2]}, "advantage: 2 values for 3 generated tokens"),
        ({"advantage": 1}, "advantage: a number, expected a list as in the first line"),
        ({"advantage": [1, 2, float("nan")]}, "advantage: nan, expected a finite number"),
        ({"sampler_logp": -1}, "sampler_logp: -1, expected a list of numbers"),
        ({"sampler_logp": [-1, -1]}, "sampler_logp: 2 values for 3 generated tokens"),
        ({"temperature": 0}, "temperature: 0, expected a positive number"),
    ],
)
def test_json_lines_refuse_bad_rows_by_line(tmp_path, change, named):
    good = MASKED | {"advantage": [1, 2, 3], "sampler_logp": [-1, -2, -3]}
    with pytest.raises(ValueError, match=f"rollouts.jsonl: line 2: {named}"):
        read(tmp_path, good, good | change)


def test_an_end_token_between_turns_is_no_padding_and_one_within_a_turn_may_be(tmp_path):
    turns = {"token_ids": [5, 6, 2, 8, 7, 2], "loss_mask": [0, 1, 1, 0, 1, 1]}
    assert read(tmp_path, turns, end_tokens=2)[1] == []
    _, said = read(tmp_path, {"token_ids": [5, 6, 2, 7, 2], "loss_mask": [0, 1, 1, 1, 1]}, end_tokens=2)
    assert "go on after an end token" in said[0]


def test_rollouts_that_differ_in_what_was_generated_are_not_equal():
    batch = PackedBatch.from_rows([[5, 6, 7, 8]] * 2, [[0, 1, 0, 1], [0, 1, 1, 1]])
    assert overlap(batch.take([0]), batch.take([1])).n_equal == 0 and overlap(batch, batch).n_equal == 2


def test_numbers_may_be_integers_beyond_64_bits():
    """As JSON has them; none that a float cannot hold."""
    rows = dict(token_ids=[[3, 4, 5]], loss_mask=[[0, 1, 1]])
    batch = PackedBatch.from_rows(**rows, sampler_logp=[[-0.5, -(2**63) - 1]])
    assert batch.sampler_logp.tolist() == [-0.5, -(2.0**63)]
    with pytest.raises(ValueError, match=r"sampler_logp\[0\]: object values, expected one number per generated token"):
        PackedBatch.from_rows(**rows, sampler_logp=[[-0.5, -(10**400)]])
