"""dentropy's own rows, and those of a loop that uses its names; also what every other format is made into."""

from __future__ import annotations

from dentropy.rollouts.files import Rows
from dentropy.rollouts.formats.fields import reward_column
from dentropy.rollouts.formats.format import Asked, Format
from dentropy.rollouts.readers import PROMPT, RESPONSE

COLUMNS = (*PROMPT[0], *PROMPT[1], *RESPONSE[0], *RESPONSE[1], "token_ids")
NO_REWARDS = ("group", "temperature", "advantage", "step", "top_p", "top_k", "min_p")


def plain_rows(rows: Rows, asked: Asked) -> Rows:
    if asked.reward is None:
        return rows
    reward = reward_column(rows, asked.reward, None, NO_REWARDS)
    return [(where, row | {"reward": row.get(reward)}) for where, row in rows]


FORMAT = Format("rollouts by dentropy's names", (), plain_rows, temperature=1.0)
