"""slime: what --save-debug-rollout-data saves, {rollout_id, samples}. A loss mask is over the response, or absent."""

from __future__ import annotations

import warnings

from dentropy.rollouts.files import Rows
from dentropy.rollouts.formats import fields
from dentropy.rollouts.formats.format import Asked, Format


def plain_rows(rows: Rows, asked: Asked) -> Rows:
    rewards = [(where, _rewards(row.get("reward"))) for where, row in rows]
    name = fields.reward_column(rewards, asked.reward, None)
    logps, groups = (fields.same_kind(rows, name) for name in ("rollout_log_probs", "group_index"))
    found = [(where, _row(where, row, logps, groups)) for where, row in rows]
    removed = sum(bool(row.get("remove_sample")) for _, row in rows)
    if removed:
        warnings.warn(
            f"{fields.source(rows)}: {removed} of {len(rows)} rollouts were left out of the loss (remove_sample); "
            "they were sampled and count",
            stacklevel=2,
        )
    if name is None:
        return found
    return [(where, row | {"reward": of.get(name)}) for (where, row), (_, of) in zip(found, rewards, strict=True)]


def _rewards(reward) -> dict:
    """By name: a reward may be a dictionary of several."""
    return reward if isinstance(reward, dict) else {"reward": reward}


def _row(where: str, row: dict, logps: bool, groups: bool) -> dict:
    ids = fields.ids(where, row, "tokens")
    n = fields.count(where, row, "response_length", len(ids))
    masked = row.get("loss_mask") is not None
    kept = fields.mask(where, row, "loss_mask", n) if masked else [True] * n
    versions = row.get("weight_versions") or []
    if not isinstance(versions, list) or any(version != versions[0] for version in versions):
        raise ValueError(f"{where}: weight_versions: {versions!r:.40}, expected one policy for the whole rollout")
    found = {"token_ids": ids, "loss_mask": [False] * (len(ids) - n) + kept, "step": row.get("rollout_id")}
    if logps:
        found["sampler_logp"] = fields.numbers(where, row, "rollout_log_probs", kept)
    if groups:
        found["group"] = fields.label(where, row, "group_index")
    return found


FORMAT = Format("a debug dump of slime", ("tokens", "response_length", "rollout_id"), plain_rows)
