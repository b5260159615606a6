"""prime-rl: token_exports/step_N/rank_R.jsonl. Every column of a row has one value for each of its tokens."""

from __future__ import annotations

from dentropy.rollouts.files import Rows
from dentropy.rollouts.formats import fields
from dentropy.rollouts.formats.format import Asked, Format


def plain_rows(rows: Rows, asked: Asked) -> Rows:
    advantages = _said(rows, "advantages")
    rewarded = asked.reward is not None or _said(rows, "rewards")
    if asked.reward not in (None, "rewards"):
        raise ValueError(f"reward: {asked.reward!r}, expected 'rewards', the only ones in {fields.source(rows)}")
    return [(where, _row(where, row, advantages, rewarded)) for where, row in rows]


def _row(where: str, row: dict, advantages: bool, rewarded: bool) -> dict:
    """is_masked and its kin are left alone: those tokens were generated, and kept out of the loss for their ratio."""
    ids = fields.ids(where, row, "token_ids")
    kept = fields.mask(where, row, "loss_mask", len(ids))
    if row.get("ce_weights") is not None and any(fields.numbers(where, row, "ce_weights", kept)):
        raise ValueError(f"{where}: ce_weights: not 0: tokens to imitate, expected only what the policy sampled")
    found = {"token_ids": ids, "loss_mask": kept, "step": row.get("export_step", row.get("step"))}
    found["sampler_logp"] = fields.numbers(where, row, "inference_logprobs", kept)
    if advantages:
        found["advantage"] = fields.numbers(where, row, "advantages", kept)
    if rewarded:
        found["reward"] = _of_the_rollout(where, row, kept)
    return found


def _said(rows: Rows, name: str) -> bool:
    """Whether any value of the column is there: without a reinforcement loss all are null."""
    return any(isinstance(row.get(name), list) and any(v is not None for v in row[name]) for _, row in rows)


def _of_the_rollout(where: str, row: dict, kept: list[bool]) -> float:
    found = set(fields.numbers(where, row, "rewards", kept))
    if len(found) != 1:
        raise ValueError(f"{where}: rewards: {len(found)} different ones at generated tokens, expected one")
    return found.pop()


FORMAT = Format("a token export of prime-rl", ("token_ids", "loss_mask", "inference_logprobs"), plain_rows, shards=True)
