"""Tensors of which each rank holds a part (torch's DTensors): made whole, read as a number, laid out alike.

PyTorch reads a number off a sum that ranks hold in parts as this rank's part, without a word. So whatever becomes a
number or a truth value passes here. All ranks must come, with the same tensors in the same order.
"""

import sys
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor


def is_shard(x) -> bool:
    # Where it was never imported nothing is one, and importing it takes a second.
    return "torch.distributed.tensor" in sys.modules and isinstance(x, sys.modules["torch.distributed.tensor"].DTensor)


def whole(x: Tensor) -> Tensor:
    """The whole tensor, on every rank; `x` itself where it is no shard."""
    if not is_shard(x):
        return x
    return _unpacked(x) if hasattr(x.placements[0], "split_factor") else x.full_tensor()


def _unpacked(x: Tensor) -> Tensor:
    """Of matrices packed into one, of which ranks hold a part each; older PyTorch does not put such together."""
    full, part, done = torch.zeros(x.shape, dtype=x.dtype, device=x.device), own_part(x.detach()), 0
    dim, runs = own_runs(x)
    for start, stop in runs:
        full.narrow(dim, start, stop - start).copy_(part.narrow(dim, done, stop - start))
        done += stop - start
    dist.all_reduce(full, group=x.device_mesh.get_group())
    return full


def own_part(x: Tensor) -> Tensor:
    """What this rank holds of `x`; `x` itself where it is no shard."""
    return x.to_local() if is_shard(x) else x


def place_of(x: Tensor, dim: int) -> tuple[int, int]:
    """Where this rank's part of `x` begins in a dimension in which it is cut, and how long it is there: of equal parts
    the last may be shorter, or nothing."""
    length, mesh = x.shape[dim], x.device_mesh
    most = -(-length // mesh.size())
    first = min(most * mesh.get_local_rank(), length)
    return first, min(most, length - first)


def largest(x: Tensor) -> float:
    """max |x|, 0 of nothing: of a few rows some ranks have none."""
    part = own_part(x)
    found = part.abs().max() if part.numel() else part.new_zeros(())
    if is_shard(x):
        dist.all_reduce(found, dist.ReduceOp.MAX, x.device_mesh.get_group())
    return float(found)


def dot(x: Tensor, y: Tensor | float) -> float:
    """Σ x∘y in float64."""
    y = beside(y, x) if isinstance(y, Tensor) else y
    return float(whole((x.double() * (y.double() if isinstance(y, Tensor) else y)).sum()))


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """`x` in parts as `like` is, each rank keeping its own of the whole that it has; `x` itself where neither is a
    shard.

    Raises:
        ValueError: for parts that are laid out otherwise. They may be in host memory, where those of `like` are not.
    """
    if is_shard(x):
        if not is_shard(like) or not _alike(x, like):
            raise ValueError(f"tensors: in parts as {x.placements}, expected them as the parameters are")
        return x
    if not is_shard(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def beside(x: Tensor, like: Tensor) -> Tensor:
    """`x` on the device of `like`, to which each rank brings its part; `x` itself where it is there, or is no shard."""
    if not (is_shard(x) and is_shard(like)) or x.device_mesh == like.device_mesh:
        return x
    return from_own_part(own_part(x).to(like.device), like)


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.placements == y.placements and torch.equal(x.device_mesh.mesh, y.device_mesh.mesh)


def own_runs(x: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """The dimension in which `x` is cut, and from where to where in it this rank's part reaches: one run, of matrices
    that are packed into one (gate and up) one of each, or none."""
    dim = getattr(x.placements[0], "dim", 0)
    places = torch.arange(x.shape[dim]).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    own = own_part(laid_out_as(places, x)).flatten().tolist()
    starts = [i for i, place in enumerate(own) if not i or place != own[i - 1] + 1]
    return dim, [(own[i], own[j - 1] + 1) for i, j in pairwise([*starts, len(own)])]


def from_own_part(part: Tensor, like: Tensor, *, on_host: bool = False) -> Tensor:
    """The tensor of which ranks hold `part` each, in the layout and of the shape of `like`, on its device or, though
    that is another, in host memory."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (like.device_mesh.size(),)) if on_host else like.device_mesh
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def without_row(x: Tensor, row: int) -> Tensor:
    """`x` with zeros in one row, in place where it is no shard."""
    if not is_shard(x):
        x[row] = 0.0
        return x
    from torch.distributed.tensor import Replicate, distribute_tensor

    kept = torch.ones(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
    kept[row] = 0.0
    return x * distribute_tensor(kept, x.device_mesh, [Replicate()] * x.device_mesh.ndim, src_data_rank=None)
