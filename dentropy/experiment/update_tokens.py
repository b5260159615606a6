"""What a run says of the update's own tokens: the columns of update_tokens.parquet, sums, the rollouts to show."""

from __future__ import annotations

import numpy as np

from dentropy.experiment.rollout_rows import SHOWN_ROLLOUTS, as_text
from dentropy.passes.token_groups import entropy_quintile
from dentropy.passes.update_attribution import UpdateAttribution

COLUMNS = ("rollout", "position", "token", "advantage", "weight", "logp", "entropy", "share")
TERMS = ("total", "tokens", "kl", "entropy_bonus", "momentum", "weight_decay", "unexplained", "cosine", "clip_factor")
WORDS = ("noise_fraction", "estimator", "optimizer")


def columns(found: UpdateAttribution) -> dict[str, np.ndarray]:
    """The columns of update_tokens.parquet, [n_tokens] each, as results.md describes them."""
    return {name: getattr(found, name) for name in COLUMNS}


def entry(found: UpdateAttribution) -> dict:
    """`update_attribution` of results.json; the contributions of every list sum to `tokens`."""
    sign = np.sign(found.advantage).astype(int)
    signs = [("positive", sign > 0), ("zero", sign == 0), ("negative", sign < 0)]
    ends = [("end token", found.end), ("other tokens", ~found.end)]
    doublings = np.frexp(found.position)[1]
    return {
        **{name: float(getattr(found, name)) for name in TERMS},
        **{name: getattr(found, name) for name in WORDS},
        "n_sequences": len(found.batch),
        "n_tokens": len(found.share),
        "by_advantage": [_named(found, name, inside) for name, inside in signs if inside.any()],
        "by_entropy": [_ranged(found, inside, found.entropy) for inside in _classes(entropy_quintile(found.entropy))],
        "by_position": [_ranged(found, inside, found.position) for inside in _classes(doublings)],
        "by_end": [_named(found, name, inside) for name, inside in ends if inside.any()],
    }


def largest(found: UpdateAttribution, tokenizer=None) -> list[dict]:
    """The update's rollouts with the largest sums of shares, in the form that `rollout_rows.largest` gives."""
    batch, text = found.batch, as_text(tokenizer)
    sums = np.bincount(found.rollout, found.share, len(batch))
    by_rollout = np.split(found.share, batch.response_offsets[1:-1])
    return [
        {
            "rollout": i,
            "group": int(batch.group[i]),
            "reward": None if batch.reward is None else float(batch.reward[i]),
            "prompt": text(batch.prompt(i)),
            "contribution": float(sums[i]),
            "tokens": [
                [text([token]), share] for token, share in zip(batch.response(i), by_rollout[i].tolist(), strict=True)
            ],
        }
        for i in np.argsort(-np.abs(sums), kind="stable")[:SHOWN_ROLLOUTS].tolist()
    ]


def _classes(label: np.ndarray) -> list[np.ndarray]:
    """Which tokens have each label that occurs, in increasing order."""
    return [label == value for value in np.unique(label)]


def _sums(found: UpdateAttribution, inside: np.ndarray) -> dict:
    return {"contribution": float(found.share[inside].sum()), "tokens": int(inside.sum())}


def _named(found: UpdateAttribution, name: str, inside: np.ndarray) -> dict:
    return {"name": name} | _sums(found, inside)


def _ranged(found: UpdateAttribution, inside: np.ndarray, values: np.ndarray) -> dict:
    return {"first": values[inside].min().item(), "last": values[inside].max().item()} | _sums(found, inside)
