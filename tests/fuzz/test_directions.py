"""Directions as safetensors files."""

import json
import struct
from functools import cache

import torch
from harness import Format, run
from mangling import ODD, as_json, mangled, mangled_bytes
from safetensors.torch import save

from dentropy import Direction

TENSORS = {"a.weight": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "b.bias": torch.tensor([1.0, 2.0]).bfloat16()}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@cache
def good():
    return save(TENSORS, metadata={"step_size": "1e-06"})


def make(folder, random):
    path = folder / "v.safetensors"
    size = struct.unpack("<Q", good()[:8])[0]
    header, body = json.loads(good()[8 : 8 + size]), good()[8 + size :]
    match random.randrange(4):
        case 0:
            data = mangled_bytes(good(), random)
        case 1:
            words = [repr(odd)[:50] for odd in ODD] + ["1e-6", "2", " 3 "]
            data = save(TENSORS, metadata={"step_size": random.choice(words)})
        case _:
            text = as_json(mangled(header, random))
            data = struct.pack("<Q", len(text)) + text + body
    path.write_bytes(data)
    return path


def forbidden(path, direction):
    """By the layout of the format: 8 bytes of length, a JSON header, the numbers."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    step = (header.pop("__metadata__", None) or {}).get("step_size", "1.0")
    if float(step) != direction.step_size or not 0 < direction.step_size < float("inf"):
        return f"its step size is {step}"
    if set(header) != set(direction.tensors):
        return "its names are others"
    for name, v in direction.tensors.items():
        start, stop = header[name]["data_offsets"]
        if header[name]["dtype"] not in SIZES or stop - start != v.numel() * SIZES[header[name]["dtype"]]:
            return f"{name} is {header[name]}"
        raw = bytearray(data[8 + size + start : 8 + size + stop])
        if not torch.isfinite(v).all() or (len(raw) and bytes(v.contiguous().view(torch.uint8).flatten()) != raw):
            return f"{name} holds others or infinite values"
    return None


def test_directions(folder):
    counts = run(Format(700, make, Direction.load, forbidden), folder)
    assert min(counts["read"], counts["refused"]) > 40
