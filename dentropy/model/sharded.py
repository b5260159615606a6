"""Sharded training checkpoints: put together without a process group, or read by each rank of one in the parts that it
needs; in both cases without running what a pickle could name.

Read by torch's own readers: a folder of torch.distributed.checkpoint (`.metadata` beside `__R_N.distcp`), and FSDP2's
state dicts as ranks save them (`model_world_size_W_rank_R.pt`, verl's). `.metadata` is a pickle, which torch loads as
it is; here it may name the classes of a checkpoint and nothing else.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dentropy.doors import reason, third_party
from dentropy.model.shards import from_own_part, own_part, place_of

METADATA = ".metadata"
RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
OPTIMIZER = re.compile(r"(^|\.)(optimizers?|optim)\.")
_DCP = "torch.distributed.checkpoint"
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath"}
ALLOWED = {  # module -> what `.metadata` may name of it
    f"{_DCP}.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "torch": {"Size", "device", "float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


def is_sharded(folder: Path) -> bool:
    return (folder / METADATA).is_file() or any(RANK_FILE.fullmatch(path.name) for path in folder.glob("model_*.pt"))


class Stored(NamedTuple):
    """A tensor of a checkpoint, of which nothing has been read yet."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[Stored, Tensor | None], Tensor]

    def whole(self) -> Tensor:
        """On the CPU, as saved."""
        return self.read(self, None)

    def part_as(self, like: Tensor) -> Tensor:
        """What this rank holds of `like`, a shard of the same shape on one dimension of a mesh, in the saved dtype."""
        return self.read(self, like)


def sharded_tensors(folder: Path, argument: str) -> dict[str, Tensor]:
    """The model's whole tensors by name, on the CPU, as saved; of an optimizer beside it none. Raises as
    `stored_tensors`, and for those that cannot be read."""
    return {name: stored.whole() for name, stored in stored_tensors(folder, argument).items()}


def stored_tensors(folder: Path, argument: str) -> dict[str, Stored]:
    """The same, not yet read.

    Raises:
        ValueError: naming `argument`, for rank files that are missing or hold other things, for tensors sharded along
            more than one dimension, and for a `.metadata` that names what no checkpoint needs or leads out of the
            folder.
    """
    where = f"{argument}: {folder}"
    found = _distributed(folder, where) if (folder / METADATA).is_file() else _of_ranks(folder, where)
    tensors = dict(found)
    if not tensors:
        raise ValueError(f"{where}: no tensors of a model, expected its weights")
    return tensors


class _Restricted(pickle._Unpickler):  # the one in Python, whose single steps can be refused
    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str):
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"it names {module}.{name}, which no checkpoint needs")

    def load_build(self):
        if isinstance(self.stack[-2], (type, Enum)):  # there once for the whole process
            raise ValueError(f"it changes {self.stack[-2]}, which no checkpoint needs")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _distributed(folder: Path, where: str) -> Iterator[tuple[str, Stored]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            return replace(metadata, storage_meta=StorageMeta(load_id=self.load_id))

    expected = "a checkpoint of torch.distributed"
    try:
        metadata = _metadata((folder / METADATA).read_bytes())
        entries = _tensors_of(metadata)
    except Exception as error:  # a damaged pickle fails in any way; all of them are refused
        raise ValueError(f"{where}: {METADATA} cannot be read ({reason(error)}), expected {expected}") from error

    @contextmanager
    def reading(name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, dcp.CheckpointException) as error:  # torch's own is no Exception
            raise ValueError(f"{where}: {name} cannot be read ({reason(error)}), expected {expected}") from error

    def read(name: str, stored: Stored, like: Tensor | None) -> Tensor:
        with reading(name):
            if like is None:
                found = torch.empty(stored.shape, dtype=stored.dtype)
            else:
                found = from_own_part(torch.empty_like(own_part(like), dtype=stored.dtype), like)
            if own_part(found).numel():
                dcp.load({name: found}, storage_reader=Reader(folder), no_dist=True)
            return own_part(found)

    for name, entry in entries.items():
        if not OPTIMIZER.search(name):
            with reading(name):
                stored = Stored(*_form(entry), partial(read, name))
            yield name, stored


def _metadata(data: bytes):
    """What `.metadata` holds; ValueError where that is no Metadata, names files outside of its folder, or has two parts
    at one place."""
    from torch.distributed.checkpoint.metadata import Metadata

    metadata = _Restricted(io.BytesIO(data)).load()
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"it names {info.relative_path}, outside of the folder")
    places = [(info.relative_path, info.offset) for info in metadata.storage_data.values()]
    if len(set(places)) < len(places):
        raise ValueError("it has two parts at one place of a file")
    return metadata


def _tensors_of(metadata) -> dict:
    """Its entries of tensors, by name."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    names = metadata.state_dict_metadata
    if not all(isinstance(name, str) for name in names):
        raise ValueError("it has names that are no text")
    return {name: entry for name, entry in names.items() if isinstance(entry, TensorStorageMetadata)}


def _form(entry) -> tuple[torch.Size, torch.dtype]:
    """Of a tensor; ValueError where its parts leave some of it out, which nothing would fill, or overlap, and where
    nothing says its dtype, which would then be the default one."""
    if not isinstance(entry.properties.dtype, torch.dtype):
        raise ValueError(f"its dtype is {entry.properties.dtype!r}")
    if sum(math.prod(part.sizes) for part in entry.chunks) == math.prod(entry.size):
        filled = torch.zeros(entry.size, dtype=torch.bool)
        for part in entry.chunks:
            filled[tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))] = True
        if filled.all():
            return filled.shape, entry.properties.dtype
    raise ValueError(f"its parts are not the whole, {list(entry.size)}")


def _of_ranks(folder: Path, where: str) -> Iterator[tuple[str, Stored]]:
    from torch.distributed.tensor import DTensor  # what it imports is what weights_only allows

    files = {int(found[2]): path for path in folder.iterdir() if (found := RANK_FILE.fullmatch(path.name))}
    worlds = {int(RANK_FILE.fullmatch(path.name)[1]) for path in files.values()}
    if worlds != {len(files)} or sorted(files) != list(range(len(files))):
        raise ValueError(f"{where}: rank files {sorted(files)} of {sorted(worlds)} ranks, expected one of each rank")
    shards = []
    for rank in sorted(files):
        with third_party(f"{where}: {files[rank].name} cannot be read", "a state dict of FSDP2"):
            shards.append(torch.load(files[rank], weights_only=True, map_location="cpu", mmap=True))
    if not all(isinstance(shard, dict) and shard.keys() == shards[0].keys() for shard in shards):
        raise ValueError(f"{where}: ranks have tensors of other names, expected the same in every file")
    for name, first in shards[0].items():
        if isinstance(first, DTensor):
            dim, parts = _parts(f"{where}: {name}", [shard[name] for shard in shards])
        elif isinstance(first, Tensor):
            dim, parts = 0, [first]
        else:
            continue
        yield name, Stored(first.shape, first.dtype, partial(_read_of_ranks, dim, parts))


def _parts(where: str, of_ranks: list) -> tuple[int, list[Tensor]]:
    """(dimension, the parts along it) of a tensor, of replicas the last."""
    from torch.distributed.tensor import Replicate, Shard

    first = of_ranks[0]
    *replicated, last = first.placements
    plain = type(last) in (Shard, Replicate)  # what derives from Shard is laid out in another order
    if not plain or not all(placement.is_replicate() for placement in replicated):
        raise ValueError(f"{where}: laid out as {first.placements}, expected one dimension sharded")
    if last.is_replicate():
        return 0, [first.to_local()]
    parts = [part.to_local() for part in of_ranks[-first.device_mesh.shape[-1] :]]
    shape = list(parts[0].shape)
    shape[last.dim] = sum(part.shape[last.dim] for part in parts)
    if shape != list(first.shape):
        raise ValueError(f"{where}: parts of {tuple(shape)} in all, expected {tuple(first.shape)}")
    return last.dim, parts


def _read_of_ranks(dim: int, parts: list[Tensor], _: Stored, like: Tensor | None) -> Tensor:
    """Out of files that are mapped into memory: what is not touched is not read."""
    if like is None:
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
    (shard,) = like.placements
    cut, (start, length) = shard.dim, place_of(like, shard.dim)
    if cut != dim:
        return torch.cat([part.narrow(cut, start, length) for part in parts], dim)
    pieces, first = [], 0
    for part in parts:
        size = part.shape[dim]
        low, high = max(start - first, 0), min(start + length - first, size)
        if low < high:
            pieces.append(part.narrow(dim, low, high - low))
        first += size
    return torch.cat(pieces, dim) if pieces else parts[0].narrow(dim, 0, 0)
