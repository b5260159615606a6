"""Directions of a model that ranks hold in parts: read from a file part by part, and kept where there is room."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dentropy.model.binding import as_held
from dentropy.model.memory import available_memory
from dentropy.model.names import resolve
from dentropy.model.shards import from_own_part, is_shard, own_part, own_runs

# Whole modules that are there at the worst moment of a pass (bench/results/sharded_memory.md): a gathered one, its
# moved weights, its v, what gathering takes, and an embedding that stays gathered.
GATHERED = 5
# Of what is free beside the weights: the rest is for activations.
SHARE = 0.5


def read_in_parts(file, model: nn.Module) -> dict[str, Tensor]:
    """By name, all tensors of an open file: of those named as a sharded parameter of `model` only this rank's part is
    read, and kept in the file's dtype where the parameter's is wider; others are read whole.

    Raises:
        ValueError: where a tensor has another shape than its parameter, or values that its dtype cannot hold.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    meant = {name: parameters[own] for name, own in resolve("direction", file.keys(), parameters).items()}
    shards = {name: p for name, p in meant.items() if is_shard(p)}
    sizes = [int(re.search(r"\d+", file.get_slice(name).get_dtype())[0]) // 8 for name in shards]  # of "BF16" 2
    host = stays_on_host(list(shards.values()), sizes)
    return {
        name: _read(file, name, shards[name], host) if name in shards else file.get_tensor(name) for name in file.keys()
    }


def stays_on_host(shards: Sequence[Tensor], sizes: Sequence[int]) -> bool:
    """Whether a direction along `shards`, with so many bytes of an element of each, is kept in host memory and brought
    to the device a module at a time, as each is gathered. The same on all ranks, which must come together."""
    if not shards or shards[0].device.type == "cpu" or "cpu:" not in str(dist.get_backend_config()):
        return False
    parts = sum(own_part(x).numel() * size for x, size in zip(shards, sizes, strict=True))
    largest = max(x.numel() * x.element_size() for x in shards)
    stays = torch.tensor(float(not fits(parts, largest, available_memory(shards[0].device))), device=shards[0].device)
    dist.all_reduce(stays, dist.ReduceOp.MAX)
    return bool(stays)


def fits(parts: float, largest: float, free: float) -> bool:
    """Whether a direction's parts, in bytes, leave room for passes on a device with so many bytes free, beside the
    weights; `largest` is the largest tensor's whole."""
    return parts + GATHERED * largest <= SHARE * free


def _read(file, name: str, parameter: Tensor, host: bool) -> Tensor:
    lazy = file.get_slice(name)
    if tuple(lazy.get_shape()) != tuple(parameter.shape):
        raise ValueError(
            f"direction: {name} has shape {tuple(lazy.get_shape())}, expected the policy's {tuple(parameter.shape)}"
        )
    dim, runs = own_runs(parameter)
    place: list[slice] = [slice(None)] * parameter.ndim
    parts = [lazy[(*place[:dim], slice(*run), *place[dim + 1 :])] for run in runs]
    part = torch.cat(parts, dim) if parts else lazy[(slice(0, 1),)].new_empty(own_part(parameter).shape)
    if part.shape != own_part(parameter).shape:
        raise RuntimeError(f"{name}: a part of {tuple(part.shape)}, where that of the parameter has another shape")
    part = part if host else part.to(parameter.device)
    return as_held(name, from_own_part(part, parameter, on_host=host), parameter)
