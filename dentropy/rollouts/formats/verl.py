"""verl: {rollout_data_dir}/{step}.jsonl.

Text is decoded without special tokens, prompts too, so the tokens of a chat template are gone from a chat model's
rows. They are put back where exactly one conversation makes that text.
"""

from __future__ import annotations

import warnings

from dentropy.rollouts.files import Rows
from dentropy.rollouts.formats.fields import reward_column, source
from dentropy.rollouts.formats.format import Asked, Format
from dentropy.rollouts.lost_template import LostTemplate

NO_REWARDS = ("step",)


def plain_rows(rows: Rows, asked: Asked) -> Rows:
    reward = reward_column(rows, asked.reward, "score", NO_REWARDS)
    template = None if asked.tokenizer is None else LostTemplate(asked.tokenizer)
    found = [(where, _row(where, row, reward, template)) for where, row in rows]
    rebuilt = sum("prompt_ids" in row for _, row in found)
    if rebuilt:
        warnings.warn(
            f"{source(rows)}: the dump has lost the chat template's tokens; {rebuilt} of {len(rows)} prompts were "
            "rebuilt with the template, which gives back their text",
            stacklevel=2,
        )
    return found


def _row(where: str, row: dict, reward: str | None, template: LostTemplate | None) -> dict:
    kept = {"response": row.get("output"), "step": row.get("step")}
    text = row.get("input")
    if template is not None and isinstance(text, str) and template.is_lost(text):
        kept["prompt_ids"] = template.rebuilt(f"{where}: input", text)
    else:
        kept["prompt"] = text
    if reward is not None:
        kept["reward"] = row.get(reward)
    if "uid" in row:
        kept["group"] = _group(where, row["uid"])
    return kept


def _group(where: str, uid) -> str:
    """uid is {sample}_{rollout}_{output}, one for each row; the sample is the prompt."""
    if not isinstance(uid, str) or uid.count("_") < 2:
        raise ValueError(f"{where}: uid: {uid!r:.40}, expected SAMPLE_ROLLOUT_OUTPUT")
    return uid.rsplit("_", 2)[0]


FORMAT = Format("a rollout dump of verl", ("input", "output", "score", "step"), plain_rows)
