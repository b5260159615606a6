"""open-instruct: {run}_rollouts_{shard:06d}.jsonl, several steps in one file."""

from __future__ import annotations

from dentropy.rollouts.files import Rows
from dentropy.rollouts.formats import fields
from dentropy.rollouts.formats.format import Asked, Format

NO_REWARDS = ("step", "prompt_idx", "sample_idx", "advantage")


def plain_rows(rows: Rows, asked: Asked) -> Rows:
    reward = fields.reward_column(rows, asked.reward, "reward", NO_REWARDS)
    advantages, logps = (fields.same_kind(rows, name) for name in ("advantage", "logprobs"))
    return [(where, _row(where, row, reward, advantages, logps)) for where, row in rows]


def _row(where: str, row: dict, reward: str | None, advantages: bool, logps: bool) -> dict:
    info = row.get("request_info")
    if isinstance(info, dict) and any(info.get(name) for name in ("tool_called", "tool_calleds")):
        raise ValueError(
            f"{where}: request_info: tools were called, whose replies stand among response_tokens without a mask, "
            "expected rollouts without tools"
        )
    response = fields.ids(where, row, "response_tokens")
    found = {
        "prompt_ids": fields.ids(where, row, "prompt_tokens"),
        "response_ids": response,
        "group": fields.label(where, row, "prompt_idx"),
        "step": row.get("step"),
    }
    if reward is not None:
        found["reward"] = row.get(reward)
    if advantages:
        found["advantage"] = fields.number(where, row, "advantage")
    if logps:
        found["sampler_logp"] = fields.numbers(where, row, "logprobs", [True] * len(response))
    return found


FORMAT = Format(
    "rollouts of open-instruct", ("prompt_tokens", "response_tokens", "prompt_idx"), plain_rows, shards=True
)
