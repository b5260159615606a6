"""Rollouts drawn by the ranks of a process group, each for its part of the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from dentropy.model.policy import Policy
from dentropy.passes import ranks
from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.sampling import sample


def drawn_by_ranks(
    policy: Policy, prompts: Sequence[Sequence[int]], *, per_prompt: int, temperature: float, seed: int, **settings
) -> PackedBatch:
    """`sample`, on every rank what all of them have drawn together; one rank alone draws what `sample` does."""
    mine = range(ranks.rank(), len(prompts), ranks.count())
    drawn: list[list[int]] = []
    if mine:
        settings |= dict(per_prompt=per_prompt, temperature=temperature, seed=seed + ranks.rank())
        batch = sample(policy, [prompts[i] for i in mine], **settings)
        drawn = [batch.response(i) for i in range(len(batch))]
    responses: list[list[int]] = [[] for _ in range(len(prompts) * per_prompt)]
    for rank, of_rank in enumerate(ranks.exchange(drawn)):
        places = range(rank, len(prompts), ranks.count())
        for number, response in enumerate(of_rank):
            responses[places[number // per_prompt] * per_prompt + number % per_prompt] = response
    group = [index for index in range(len(prompts)) for _ in range(per_prompt)]
    return PackedBatch.from_lists([prompts[g] for g in group], responses, group=group, temperature=temperature)
