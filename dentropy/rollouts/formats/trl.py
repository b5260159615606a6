"""TRL: completions/completions_{step}.parquet of its GRPO and RLOO trainers, or the same rows as JSON lines.

One column per reward function, named after it, and columns of the user's own, which nothing tells from them. The
advantage has been normalized within groups.
"""

from __future__ import annotations

from dentropy.rollouts.files import Rows
from dentropy.rollouts.formats.fields import reward_column
from dentropy.rollouts.formats.format import Asked, Format

KEPT = ("step", "prompt", "completion", "advantage", "temperature")


def plain_rows(rows: Rows, asked: Asked) -> Rows:
    reward = reward_column(rows, asked.reward, None, KEPT)
    return [(where, _row(row, reward)) for where, row in rows]


def _row(row: dict, reward: str | None) -> dict:
    kept = {name: _messages(row[name]) for name in KEPT if name in row}
    return kept if reward is None else kept | {"reward": row.get(reward)}


def _messages(value):
    """Parquet gives every message the keys that any message has: those without a value are left out."""
    if not isinstance(value, list):
        return value
    return [
        {key: part for key, part in message.items() if part is not None or key == "content"}
        if isinstance(message, dict)
        else message
        for message in value
    ]


FORMAT = Format("a completions log of TRL", ("step", "prompt", "completion", "advantage"), plain_rows)
