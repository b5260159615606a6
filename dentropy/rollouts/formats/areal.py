"""AReaL: rollout/{version}/{task}.jsonl. Text keeps its special tokens; the lengths say whether it can be encoded back.

Weights may change while a rollout is sampled: head_version and tail_version are the first and the last policy of it.
"""

from __future__ import annotations

import warnings

from dentropy.doors import third_party
from dentropy.rollouts.files import Rows
from dentropy.rollouts.formats import fields
from dentropy.rollouts.formats.format import Asked, Format

NO_REWARDS = ("task_id", "sample_idx", "seqlen", "prompt_len", "head_version", "tail_version")


def plain_rows(rows: Rows, asked: Asked) -> Rows:
    reward = fields.reward_column(rows, asked.reward, "reward", NO_REWARDS)
    found = [(where, _row(where, row, reward)) for where, row in rows]
    if asked.tokenizer is not None:
        differing = sum(_differs(where, row, asked.tokenizer) for where, row in rows)
        if differing:
            warnings.warn(
                f"{fields.source(rows)}: {differing} of {len(rows)} rollouts encode to another number of "
                "tokens than the file says they had",
                stacklevel=2,
            )
    return found


def _row(where: str, row: dict, reward: str | None) -> dict:
    head, tail = (fields.present(where, row, name) for name in ("head_version", "tail_version"))
    if head != tail:
        raise ValueError(
            f"{where}: head_version {head!r:.20}, tail_version {tail!r:.20}: sampled by several policies, expected one"
        )
    found = {
        "prompt": fields.text(where, row, "prompt"),
        "response": fields.text(where, row, "completion"),
        "group": fields.label(where, row, "task_id"),
        "step": tail,
    }
    return found if reward is None else found | {"reward": row.get(reward)}


def _differs(where: str, row: dict, tokenizer) -> bool:
    prompt, rest = (row[name] for name in ("prompt", "completion"))
    with third_party(f"{where}: prompt or completion: the tokenizer refuses it", "text that it knows"):
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in (prompt, rest)]
    return [row.get("prompt_len"), row.get("seqlen")] != [lengths[0], sum(lengths)]


FORMAT = Format(
    "rollouts of AReaL", ("prompt", "completion", "task_id", "head_version", "tail_version"), plain_rows, shards=True
)
