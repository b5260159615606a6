"""Folders of torch.distributed.checkpoint: `.metadata`, a pickle that names files, sizes and places, and the data.

Each is refused in one line or read as its metadata says, and nothing that a pickle could name is run or changed.
"""

import collections
import copy
import io
import os
import pathlib
import pickle
import shutil
from dataclasses import fields, is_dataclass

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import Format, run
from mangling import ODD, mangled_bytes
from torch.distributed.checkpoint import filesystem, metadata

from dentropy.model.sharded import sharded_tensors

ODDER = (
    *ODD,
    *(torch.Size(size) for size in ([3], [1, 2], [2, 3], [2**40], [])),
    *(torch.float64, torch.int32, torch.device("cpu"), torch.strided, pathlib.PurePosixPath(".."), "../__0_0.distcp"),
    metadata.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 2])),
    metadata.BytesStorageMetadata(),
)
FUNCTIONS = (pytest.fail, os.system, eval, exec, open, __import__, getattr, torch.load, pickle.loads, print)
ONCE = (metadata.Metadata, metadata.MetadataIndex, filesystem._StorageInfo, pathlib.PurePosixPath, torch.Size)
ONCE += (metadata._MEM_FORMAT_ENCODING, collections.OrderedDict, torch.float32)


class Calls:
    """A call when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Three tensors of a model, one of its optimizer and a number; the first tensor in two parts, as two ranks' are."""
    folder = tmp_path_factory.mktemp("good") / "checkpoint"
    weight = torch.arange(6.0).reshape(3, 2)
    model = {"w": weight, "b": torch.ones(2, dtype=torch.bfloat16), "s": torch.tensor(7.0)}
    dcp.save({"model": model, "optim": {"w": torch.zeros(3, 2)}, "step": 3}, checkpoint_id=folder, no_dist=True)
    saved, data = metadata_of(folder), b""
    chunks = saved.state_dict_metadata["model.w"].chunks = []
    saved.storage_data.pop(metadata.MetadataIndex("model.w", torch.Size([0, 0])))
    for first, part in ((0, weight[:2]), (2, weight[2:])):
        at, file = torch.Size([first, 0]), io.BytesIO()
        torch.save(part.clone(), file)
        chunks.append(metadata.ChunkStorageMetadata(at, part.shape))
        info = filesystem._StorageInfo("__1_0.distcp", len(data), len(file.getvalue()))
        saved.storage_data[metadata.MetadataIndex("model.w", at)] = info
        data += file.getvalue()
    (folder / "__1_0.distcp").write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(saved))
    return folder


def metadata_of(folder):
    """By the unpickler in Python: that in C also minds the lengths of frames, which say nothing of what is in them."""
    return pickle._loads((folder / ".metadata").read_bytes())


def make(good):
    saved = metadata_of(good)

    def write(folder, random):
        place = folder / "checkpoint"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place)
        file = place / ".metadata"
        match random.randrange(9):
            case 0:
                file.write_bytes(mangled_bytes(file.read_bytes(), random))
            case 3:  # to the very data, by a way around
                changed = copy.deepcopy(saved)
                info = random.choice(list(changed.storage_data.values()))
                info.relative_path = random.choice([f"../{place.name}/", f"{place}/", "./"]) + info.relative_path
                file.write_bytes(pickle.dumps(changed))
            case 1:
                data = random.choice(sorted(place.glob("*.distcp")))
                data.write_bytes(mangled_bytes(data.read_bytes(), random))
            case 2:
                file.write_bytes(evil(saved, random))
            case _:
                file.write_bytes(pickle_of(saved, random))
        return place

    return write


def pickle_of(saved, random):
    """Of a mangled copy; where there is none, as of a memory format that is a number, what is said of it."""
    try:
        return pickle.dumps(mangled(saved, random), protocol=random.choice([2, 4, 5]))
    except Exception as error:
        return str(error).encode("utf-8", "replace")


def evil(saved, random):
    """A pickle that calls what no checkpoint needs, or changes what the process has once."""
    if random.random() < 0.3:
        state = random.choice([(None, {"is_file": torch.Size}), {"is_file": torch.Size}, (None, {"__eq__": None})])
        return b"\x80\x04" + opcodes(random.choice(ONCE)) + opcodes(state) + b"b."
    call = Calls(random.choice(FUNCTIONS), (random.choice(["pytest.fail('ran')", "/dev/null", "os", b"x"]),))
    if random.random() < 0.3:
        return pickle.dumps(call)
    changed = copy.deepcopy(saved)
    put(*random.choice(list(places([changed], 3))), call)
    return pickle.dumps(changed)


def opcodes(value):
    """Those that make a value, without the beginning and the end of a pickle."""
    return pickle.dumps(value, protocol=3)[2:-1]


def mangled(value, random):
    """A copy with one to three nodes replaced, removed or put elsewhere, in dictionaries, lists and dataclasses."""
    top = [copy.deepcopy(value)]
    for _ in range(random.randint(1, 3)):
        nodes = list(places(top))
        holder, key = random.choice(nodes)
        match random.randrange(4):
            case 0 | 1:
                put(holder, key, copy.deepcopy(random.choice(ODDER)))
            case 2:
                put(holder, key, copy.deepcopy(get(*random.choice(nodes))))
            case 3 if holder is not top:
                delattr(holder, key) if is_dataclass(holder) else holder.pop(key)
    return top[0]


def places(value, deepest=9):
    """(holder, key) of every node below."""
    left = [(value, 0)]
    while left:
        holder, depth = left.pop()
        for key in keys(holder) if depth < deepest else ():
            yield holder, key
            left.append((get(holder, key), depth + 1))


def keys(holder):
    if isinstance(holder, (dict, list)):
        return list(holder) if isinstance(holder, dict) else range(len(holder))
    return [f.name for f in fields(holder) if f.name in vars(holder)] if is_dataclass(holder) else ()


def get(holder, key):
    return getattr(holder, key) if is_dataclass(holder) else holder[key]


def put(holder, key, value):
    if is_dataclass(holder):
        setattr(holder, key, value)
    else:
        holder[key] = value


def read(path):
    return sharded_tensors(path, "policy")


def forbidden(path, tensors):
    """Put together by hand, part by part, from what the metadata says."""
    try:
        saved = metadata_of(path)
        entries = saved.state_dict_metadata
        tensor_names = [name for name, e in entries.items() if isinstance(e, metadata.TensorStorageMetadata)]
        if set(tensors) != {name for name in tensor_names if "optim." not in name}:
            return f"its tensors are {tensor_names}"
        for name, found in tensors.items():
            entry = entries[name]
            whole = torch.full(entry.size, float("nan"))
            for part in entry.chunks:
                info = saved.storage_data[metadata.MetadataIndex(name, part.offsets)]
                assert "/" not in info.relative_path
                data = (path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
                place = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))
                whole[place] = torch.load(io.BytesIO(data), weights_only=True).float()
            if found.dtype != entry.properties.dtype or not torch.equal(found.float(), whole):
                return f"{name} is {whole}"
    except Exception as error:
        return f"the format forbids it ({error!r:.200})"
    return None


def fuzz(count, good, folder):
    before = {each: dict(vars(each)) for each in ONCE if isinstance(each, type)}
    counts = run(Format(count, make(good), read, forbidden, argument="policy: "), folder)
    assert min(counts["read"], counts["refused"]) > count / 20
    assert all(dict(vars(each)) == was for each, was in before.items())


def test_distributed_checkpoints(folder, good):
    fuzz(300, good, folder)


@pytest.mark.slow
def test_many_distributed_checkpoints(folder, good):
    fuzz(10_000, good, folder)
