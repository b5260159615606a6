"""NeMo-RL: train_data_step{N}.jsonl. Values arrive as lists of one, token columns padded to the longest row."""

from __future__ import annotations

import warnings

from dentropy.rollouts.files import Rows
from dentropy.rollouts.formats import fields
from dentropy.rollouts.formats.format import Asked, Format

NO_REWARDS = ("input_lengths", "sample_loss_mask", "idx")


def plain_rows(rows: Rows, asked: Asked) -> Rows:
    rows = [(where, {name: _only(value) for name, value in row.items()}) for where, row in rows]
    reward = fields.reward_column(rows, asked.reward, "rewards", NO_REWARDS)
    advantages, logps = (fields.same_kind(rows, name) for name in ("advantages", "generation_logprobs"))
    found = [(where, _row(where, row, reward, advantages, logps)) for where, row in rows]
    left_out = sum(row.get("sample_loss_mask") == 0 for _, row in rows)
    if left_out:
        warnings.warn(
            f"{fields.source(rows)}: {left_out} of {len(rows)} rollouts were left out of the loss (sample_loss_mask); "
            "they were sampled and count, with an advantage of 0",
            stacklevel=2,
        )
    return found


def _only(value):
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _row(where: str, row: dict, reward: str | None, advantages: bool, logps: bool) -> dict:
    ids = fields.ids(where, row, "token_ids")
    n = fields.count(where, row, "input_lengths", len(ids))
    kept = [*fields.mask(where, row, "token_loss_mask", len(ids))[:n], *[False] * (len(ids) - n)]
    found = {"token_ids": ids[:n], "loss_mask": kept[:n]}
    if reward is not None:
        found["reward"] = row.get(reward)
    if advantages:
        weight = fields.number(where, row, "sample_loss_mask") if "sample_loss_mask" in row else 1.0
        if weight not in (0, 1):
            raise ValueError(f"{where}: sample_loss_mask: {weight}, expected 0 or 1")
        found["advantage"] = [weight * a for a in fields.numbers(where, row, "advantages", kept)]
    if logps:
        found["sampler_logp"] = fields.numbers(where, row, "generation_logprobs", kept)
    return found


FORMAT = Format("training data of NeMo-RL", ("token_ids", "token_loss_mask", "input_lengths"), plain_rows)
