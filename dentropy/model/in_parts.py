"""Tensors of a safetensors file, read by each rank in the parts that it has of a sharded model's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dentropy.model.names import resolve
from dentropy.model.shards import from_own_part, is_shard, own_part, own_runs


def read_in_parts(file, model: nn.Module) -> dict[str, Tensor]:
    """By name, all tensors of an open file: of those named as a sharded parameter of `model` only this rank's part is
    read, in the file's dtype; others are read whole.

    Raises:
        ValueError: where a tensor has another shape than its parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = list(file.keys())
    meant = resolve("direction", names, parameters)
    return {name: _read(file, name, parameters.get(meant.get(name))) for name in names}


def _read(file, name: str, parameter: Tensor | None) -> Tensor:
    if parameter is None or not is_shard(parameter):
        return file.get_tensor(name)
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
    return from_own_part(part.to(parameter.device), parameter)
