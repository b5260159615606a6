"""What a run says of single rollouts: the columns of rollouts.parquet, and those that the report shows by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from dentropy.estimators import Estimate, token_attribution
from dentropy.estimators.reweighting import FORM, weighted
from dentropy.experiment.changes import Change
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import SequenceSums

SHOWN_ROLLOUTS = 24


def columns(
    base: SequenceSums, reward: np.ndarray | None, estimates: dict[str, Estimate], changes: Sequence[Change]
) -> dict[str, np.ndarray]:
    """The columns of rollouts.parquet, as results.md describes them.

    Args:
        base: The table at the base weights, with tangent columns.
        reward: [S] in the batch's order, or None.
        estimates: By the name of the column that holds their contributions.
        changes: Those of `measured`, in their order.

    Returns:
        Arrays [S] by name, in the batch's order.
    """
    order = np.argsort(base.rollout)
    of_base = {name: column[order] for name, column in base.columns().items()}
    found = {"rollout": of_base.pop("rollout"), "group": of_base.pop("group")}
    if reward is not None:
        found["reward"] = reward[found["rollout"]]
    found |= of_base
    averaged = weighted(base, FORM["causal"])
    scale = 1 / averaged.n_tokens.sum()
    found["slope_uncorrected"] = (averaged.dentropy + averaged.entropy_to_go)[order] * scale
    for name, estimate in estimates.items():
        found[name] = estimate.contributions[order]
    for index, change in enumerate(changes):
        found[f"delta_contribution_{index}"] = change.measured.contributions[order]
        found[f"prefix_log_weight_{index}"] = change.measured.log_weights[order]
        found[f"prefix_entropy_{index}"] = change.measured.moved_entropy[order]
        found[f"prefix_tokens_{index}"] = change.measured.size[order]
        found[f"log_weight_{index}"] = change.sequence.measured.log_weights[order]
        found[f"moved_entropy_{index}"] = change.moved.entropy[np.argsort(change.moved.rollout)]
        found[f"delta_contribution_sequence_{index}"] = change.sequence.measured.contributions[order]
    return found


def largest(base: SequenceSums, batch: PackedBatch, contributions: np.ndarray, tokenizer=None) -> list[dict]:
    """The rollouts with the largest `contributions` to the exact slope, with what each of their tokens does.

    Args:
        base: The table at the base weights, with kept tokens.
        batch: The rollouts it was made from.
        contributions: [S] in the table's order, nats per token per unit of η.
        tokenizer: Its `decode` gives their text; without it they are token ids.

    Returns:
        At most SHOWN_ROLLOUTS dicts with rollout, group, reward (or None), prompt, contribution and tokens, a list
        of [text, contribution]; what was given between generated tokens is one of [text, None].
    """
    by_token = np.split(token_attribution(base, estimator="exact"), np.cumsum(base.n_tokens).astype(int)[:-1])

    text, found = as_text(tokenizer), []
    for row in np.argsort(-np.abs(contributions), kind="stable")[:SHOWN_ROLLOUTS].tolist():
        i = int(base.rollout[row])
        shares = iter(by_token[row].tolist())
        parts = groupby(list(zip(*batch.row(i), strict=True))[batch.prompt_lens[i] :], key=lambda token: token[1])
        tokens = []
        for generated, part in parts:
            ids = [token for token, _ in part]
            tokens += [[text([token]), next(shares)] for token in ids] if generated else [[text(ids), None]]
        found.append(
            {
                "rollout": i,
                "group": int(base.group[row]),
                "reward": None if batch.reward is None else float(batch.reward[i]),
                "prompt": text(batch.prompt(i)),
                "contribution": float(contributions[row]),
                "tokens": tokens,
            }
        )
    return found


def as_text(tokenizer) -> Callable[[list[int]], str]:
    """Token ids as the tokenizer's text, or as numbers without one."""
    return lambda ids: " ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.decode(ids)
