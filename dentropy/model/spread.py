"""How a model's parameters are spread over ranks, and with it what stands in their places in a pass."""

from torch import nn

from dentropy.model.fully_sharded import FullySharded, is_fully_sharded
from dentropy.model.shards import is_shard
from dentropy.model.tensor_parallel import TensorParallel


def spread_of(model: nn.Module) -> FullySharded | TensorParallel | None:
    """None for a model with whole parameters; ValueError, by name, for what cannot be handled."""
    shards = {name: p for name, p in model.named_parameters() if is_shard(p)}
    if not shards:
        return None
    kind = FullySharded if is_fully_sharded(model) else TensorParallel
    return kind.of(model, shards)
