"""What ranks that share every product (tensor parallel) must agree on: what each of them holds, or made, whole.

A parameter that is not cut is there on every rank, and so is its gradient, each from the same sums. Where these are
not the same, a sum over ranks is missing somewhere, and every number behind it is wrong.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from dentropy.model.shards import is_shard
from dentropy.passes import ranks

# Of ranks on which the same sums come out in another order; of parts of a sum it would be about 1.
TOLERANCE = 1e-2


def agree_on_gradient(gradient: Sequence[Tensor]) -> None:
    """Those of whole parameters become the first rank's, to the last bit, which all others' are but for rounding.

    Raises:
        RuntimeError: where they are not.
    """
    ranks.exchange(None)  # a rank that has failed says so here: it cannot between collectives
    off = 0.0
    for own in (g for g in gradient if not is_shard(g)):
        first = own.clone()
        dist.broadcast(first, 0)
        size = float(first.norm())
        off = max(off, float((own - first).norm()) / size if size else float(own.norm() > 0))
        own.copy_(first)
    if not max(ranks.exchange(off)) <= TOLERANCE:
        raise RuntimeError(
            "gradient: of parameters that every rank holds whole it is not the same on all ranks, expected a tp_plan "
            "under which each rank gets all of it"
        )
