"""Kinds of the update's tokens by name, each a mask over them."""

from collections.abc import Iterable

import numpy as np

from dentropy.passes.update_attribution import UpdateAttribution

QUINTILES = 5
GROUPS = {
    "positive advantage": lambda found: found.advantage > 0,
    "negative advantage": lambda found: found.advantage < 0,
    "end token": lambda found: _first_of_rollout(found.end, found.rollout),
    "high entropy": lambda found: entropy_quintile(found.entropy) == QUINTILES - 1,
    "low entropy": lambda found: entropy_quintile(found.entropy) == 0,
}


def token_groups(found: UpdateAttribution, names: Iterable[str] = tuple(GROUPS)) -> dict[str, np.ndarray]:
    """The masks of `names`, bool [n_tokens] each, of those that hold a token with a weight in the loss.

    Names are "positive advantage", "negative advantage", "end token" (the first of a rollout), "high entropy" and "low
    entropy" (the highest and the lowest quintile, equal values together).

    Raises:
        ValueError: for other names.
    """
    names = tuple(names)
    for name in names:
        check_group(name)
    masks = {name: GROUPS[name](found) for name in names}
    return {name: mask for name, mask in masks.items() if found.weight[mask].any()}


def check_group(name: str) -> None:
    """ValueError where no group has that name."""
    if name not in GROUPS:
        raise ValueError(f"groups: {name!r}, expected one of {', '.join(map(repr, GROUPS))}")


def entropy_quintile(values: np.ndarray) -> np.ndarray:
    """0 to 4, equal values together."""
    ends = np.quantile(values, np.arange(1, QUINTILES) / QUINTILES)
    return np.searchsorted(ends, values, side="left")


def _first_of_rollout(inside: np.ndarray, rollout: np.ndarray) -> np.ndarray:
    """Of the tokens `inside`, the first of each rollout."""
    found = np.zeros(len(inside), bool)
    at = np.flatnonzero(inside)
    found[at[np.unique(rollout[at], return_index=True)[1]]] = True
    return found
