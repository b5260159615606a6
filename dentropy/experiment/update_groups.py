"""What a run says of groups of the update's tokens: their shares of the slope, and the update without them."""

from __future__ import annotations

from collections.abc import Sequence

from dentropy.experiment.entries import errors
from dentropy.model.policy import Policy
from dentropy.passes.policy_gradient import PolicyGradientStep
from dentropy.passes.token_groups import check_group, token_groups
from dentropy.passes.update_attribution import UpdateAttribution
from dentropy.passes.update_groups import UpdateGroup, tokens_of, update_groups
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import SequenceSums


def check_groups(names: Sequence[str], policy: Policy, update: PolicyGradientStep | None) -> tuple[str, ...]:
    """Each name once; ValueError for one that no group has, and without an update of this policy."""
    names = tuple(dict.fromkeys(names))
    for name in names:
        check_group(name)
    if names and update is None:
        raise ValueError(f"groups: {names[0]!r} without an update, expected update rollouts whose tokens these are")
    if names and update.policy is not policy:
        raise ValueError(
            "update: a step of another policy, expected one made with this Policy for groups of its tokens"
        )
    return names


def grouped(
    policy: Policy,
    batch: PackedBatch,
    update: PolicyGradientStep,
    sums: SequenceSums,
    found: UpdateAttribution,
    names: Sequence[str],
    *,
    progress,
    **settings,
) -> dict[str, UpdateGroup | None]:
    """`update_groups` by name, None for a group without a token that has a weight in the loss."""
    if not names:
        return {}
    masks = token_groups(found, names)
    made = update_groups(policy, batch, update, sums, masks, progress=progress, **settings)
    if progress is not None:
        progress((len(names) - len(masks)) * (update.batch.n_tokens + batch.n_tokens))
    return {name: made.get(name) for name in names}


def tokens_run(found: dict[str, UpdateGroup | None], update: PolicyGradientStep | None, batch: PackedBatch) -> int:
    """How many tokens ran for them, in reverse mode and with tangents."""
    ran = [group.mask for group in found.values() if group is not None and not group.is_complement]
    return sum(tokens_of(update, mask) + batch.n_tokens for mask in ran)


def entry(found: dict[str, UpdateGroup | None]) -> list[dict]:
    """`update_groups` of results.json."""
    return [
        {
            "name": name,
            "tokens": 0 if group is None else int(group.mask.sum()),
            "share": None if group is None else {"value": group.share.value, **errors(group.share)},
            "rest": None if group is None else {"value": group.rest.value, **errors(group.rest)},
        }
        for name, group in found.items()
    ]
