"""Which rollouts of a microbatch are to blame where its statistics are not finite: each is run again alone.

In a packed row what is not finite spreads: an attention weight of zero times NaN is NaN, so the rollouts that share the
row with one that overflows come out as NaN too.
"""

from collections.abc import Callable

import numpy as np
import torch

from dentropy.passes.microbatches import Microbatch, TokenBudget
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.segments import PIECE
from dentropy.stats.tables import TokenStats

# More than these are no single rollouts: the policy itself is broken.
MOST, MOST_OF_ALL = 100, 0.01


def blame_rollouts(
    stats: TokenStats, batch: PackedBatch, budget: TokenBudget, score: Callable[[Microbatch], TokenStats]
) -> TokenStats:
    """`stats` with those of rollouts that are not finite taken from a run of each alone.

    Raises ValueError where, alone, more than 100 and one in a hundred are not finite.
    """
    present = [x for x in stats if x is not None]
    # A sum is not finite where one of its terms is not; one that only overflows is looked at token by token.
    if all(torch.isfinite(part.sum(dtype=torch.float64)) for x in present for part in x.split(PIECE)):
        return stats
    finite = torch.ones_like(stats.logp, dtype=torch.bool)
    for x in present:
        finite &= torch.isfinite(x)
    if finite.all():
        return stats
    stats = TokenStats(*(None if x is None else x.clone() for x in stats))
    of_token = np.repeat(np.arange(len(batch)), batch.response_lens)
    bad: list[int] = []
    for rollout in np.unique(of_token[~finite.cpu().numpy()]).tolist():
        alone = Microbatch.of(batch, np.array([rollout]), budget.device)
        found = score(alone)
        for column, values in zip(stats, found, strict=True):
            if column is not None:
                column[torch.from_numpy(alone.places)] = values
        if not all(torch.isfinite(x).all() for x in found if x is not None):
            bad.append(rollout)
        if len(bad) > max(MOST, MOST_OF_ALL * len(batch)):
            raise ValueError(
                f"policy: statistics of {len(bad):,} rollouts, the first of them {bad[0]}, are not finite, expected a "
                "policy and a direction whose numbers stay in range"
            )
    return stats
