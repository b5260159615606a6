"""What a run says of groups of the update's tokens: their shares of the slope, and what the rest makes, with errors."""

from __future__ import annotations

from dentropy.experiment.entries import errors
from dentropy.passes.update_groups import UpdateGroup


def entry(found: dict[str, UpdateGroup]) -> list[dict]:
    """`update_groups` of results.json."""
    return [
        {
            "name": name,
            "tokens": int(group.mask.sum()),
            **{part: {"value": e.value, **errors(e)} for part, e in (("share", group.share), ("rest", group.rest))},
        }
        for name, group in found.items()
    ]
