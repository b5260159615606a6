"""Whether rollouts made the update that they are to judge, and how to divide them so that they did not.

An update made from rollouts fits their noise, and the same noise is in every estimate from them: both errors are
multiplied, and the mean of that is no zero. The bias falls as one over the number of prompts and often has the wrong
sign, whatever the error bar says.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from dentropy.rollouts.batch import PackedBatch

# Beyond this share a file is a copy, with or without changes.
MOSTLY = 0.5
# Standard errors beyond what chance gives.
CLEAR = 3.0


@dataclass(frozen=True)
class Overlap:
    """n_equal: rollouts that occur in the update's too, token by token. share: of the rollouts, the share that is
    shared beyond what chance gives; 0 where that is all there is."""

    n_equal: int
    share: float


def overlap(batch: PackedBatch, update: PackedBatch) -> Overlap:
    """How many rollouts of `batch` are among those of `update`.

    Short answers are equal by chance: how many, the twins within either batch tell, which were drawn apart.

    Example:
        >>> batch = PackedBatch.from_lists([[3]] * 8, [[4, i] for i in range(8)])
        >>> overlap(batch, batch)
        Overlap(n_equal=8, share=1.0)
    """
    rows, others = _rows(batch), _rows(update)
    n, known = len(rows), set(others)
    n_equal = sum(row in known for row in rows)
    chance = max(_twins(rows), _twins(others), 1 / n)
    spread = np.sqrt(n * chance * (1 - chance))
    if chance == 1 or n_equal - n * chance <= CLEAR * spread:
        return Overlap(n_equal, 0.0)
    return Overlap(n_equal, (n_equal / n - chance) / (1 - chance))


def split(batch: PackedBatch, update: PackedBatch, seed: int = 0) -> tuple[PackedBatch, PackedBatch]:
    """`update` with half of its prompts, drawn at random, and `batch` without these: nothing of a prompt is on both
    sides.

    Raises:
        ValueError: where one of them would be empty.
    """
    of_update, of_batch = _prompts(update), _prompts(batch)
    prompts = sorted(set(of_update))
    if len(prompts) < 2:
        raise ValueError(f"split: {len(prompts)} prompt to make the update from, expected at least 2")
    half = np.random.default_rng(seed).permutation(len(prompts))[: len(prompts) // 2]
    made = {prompts[i] for i in half}
    judges = [i for i, prompt in enumerate(of_batch) if prompt not in made]
    if not judges:
        raise ValueError("split: no rollout is left to judge the update on, expected other prompts too")
    return batch.take(judges), update.take([i for i, prompt in enumerate(of_update) if prompt in made])


def _rows(batch: PackedBatch) -> list[tuple[bytes, bytes]]:
    """Each rollout as something to compare: its tokens, and which of them were generated."""
    columns = (batch.tokens.numpy(), batch.generated)
    return [
        tuple(column[start:stop].tobytes() for column in columns)
        for start, stop in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    ]


def _twins(rows: list) -> float:
    """The share of rows that occur more than once."""
    return sum(n for n in Counter(rows).values() if n > 1) / len(rows)


def _prompts(batch: PackedBatch) -> list[tuple[int, ...]]:
    """The prompt of each rollout's group: the first one's, where a group has several."""
    first: dict[int, tuple[int, ...]] = {}
    return [first.setdefault(group, tuple(batch.prompt(i))) for i, group in enumerate(batch.group.tolist())]
