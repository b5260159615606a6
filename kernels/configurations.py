"""Which shapes a kernel runs with, and how it reads: the one place that knows devices.

Chosen by the architecture and shared memory of a device, the bytes of an element, and what a kernel holds at a time.
Every entry was compiled for the devices that it is for: it fits their shared memory and, but for some bytes, their
registers (bench/results/compiled_kernels.md). Of those for Hopper, the head's and the attention tangent's were the
fastest of sketches on an H100; the others have run nowhere that would tell how fast they are.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

from .products import INTERPRETED


class Hardware(NamedTuple):
    architecture: int  # 10 · major + minor of the compute capability; 0 for what is no GPU of NVIDIA's
    shared_memory: int  # KiB that a program can have


class Tile(NamedTuple):
    """A program's share of the head's products, rows × columns of the vocabulary × depth of a step."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


class Blocks(NamedTuple):
    """A program's queries, and the keys of a step."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@cache
def hardware(device: torch.device) -> Hardware:
    """Of anything else than NVIDIA's GPUs, what every device has."""
    if device.type != "cuda" or torch.version.hip is not None:
        return Hardware(0, 64)
    properties = torch.cuda.get_device_properties(device)
    return Hardware(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin // 1024)


def generation(device: torch.device) -> str:
    """The column of the tables that `device` has the shared memory and the instructions for."""
    architecture, shared_memory = hardware(device)
    if architecture >= 90 and shared_memory >= 227:
        return "hopper" if architecture < 100 else "blackwell"
    if architecture >= 80 and shared_memory >= 99:
        return "ampere"  # and what came after it for consumers
    return "least"


def has_descriptors(device: torch.device) -> bool:
    """Whether kernels may read by the tensor memory accelerator; interpreted ones have its descriptors too."""
    return bool(INTERPRETED) or hardware(device).architecture >= 90


# The head, by what moves: nothing, the hidden states alone, anything else. Wider tiles have no registers left for a
# bias: they would spill some kilobytes of a thread's. On Ampere so would steps twice as deep, some dozens of bytes; of
# these tiles one alone, of the head that moves, spills 8, outside all loops.
HEAD = {
    "hopper": {
        "nothing": Tile(128, 256, 64, 8, 3),
        "hidden": Tile(64, 256, 64, 8, 3),
        "more": Tile(128, 128, 64, 8, 3),
        "float32": Tile(64, 64, 32, 8, 2),
    },
    "ampere": {
        "nothing": Tile(128, 128, 32, 8, 3),
        "hidden": Tile(128, 64, 32, 8, 4),
        "more": Tile(128, 64, 32, 8, 4),
        "float32": Tile(64, 64, 16, 8, 2),
    },
    "least": {
        "nothing": Tile(128, 64, 32, 8, 2),
        "hidden": Tile(128, 64, 32, 8, 2),
        "more": Tile(64, 64, 32, 8, 2),
        "float32": Tile(64, 64, 16, 8, 2),
    },
}
HEAD["blackwell"] = HEAD["hopper"]


def head_tile(hidden, dhidden, dweight, biases, aligned: bool) -> Tile:
    """For the products that these tensors (None for what is not there) make; whether all their rows are `aligned`."""
    if hidden.dtype == torch.float32:
        held = "float32"
    elif any(tensor is not None for tensor in (dweight, *biases)):
        held = "more"
    else:
        held = "nothing" if dhidden is None else "hidden"
    # What is loaded element by element takes the registers that wider tiles need.
    return HEAD[generation(hidden.device) if aligned else "least"][held]


# Attention and its tangent, by bytes of an element and padded head size. A step of the tangent has four tiles rather
# than two, and two of queries stay.
ATTENTION = {
    "hopper": {
        (2, 64): Blocks(128, 64, 4, 3),
        (2, 128): Blocks(128, 64, 8, 3),
        (2, 256): Blocks(128, 64, 8, 2),
        (4, 64): Blocks(64, 32, 8, 2),
        (4, 128): Blocks(64, 32, 16, 2),
        (4, 256): Blocks(32, 16, 8, 2),
    },
    "ampere": {
        (2, 64): Blocks(128, 64, 8, 3),
        (2, 128): Blocks(128, 32, 8, 3),
        (2, 256): Blocks(64, 32, 4, 2),
        (4, 64): Blocks(64, 32, 8, 2),
        (4, 128): Blocks(32, 32, 8, 2),
        (4, 256): Blocks(32, 16, 8, 2),
    },
    "least": {
        (2, 64): Blocks(64, 32, 4, 2),
        (2, 128): Blocks(64, 32, 8, 2),
        (2, 256): Blocks(32, 16, 4, 2),
        (4, 64): Blocks(32, 32, 8, 2),
        (4, 128): Blocks(32, 16, 8, 2),
        (4, 256): Blocks(16, 16, 4, 2),
    },
}
ATTENTION["blackwell"] = ATTENTION["hopper"] | {(2, 64): Blocks(128, 64, 8, 3)}
ATTENTION_TANGENT = {
    "hopper": {
        (2, 64): Blocks(128, 64, 8, 3),
        (2, 128): Blocks(128, 64, 8, 2),
        (2, 256): Blocks(64, 32, 4, 2),
        (4, 64): Blocks(64, 16, 8, 2),
        (4, 128): Blocks(16, 16, 8, 2),
        (4, 256): Blocks(16, 16, 8, 2),
    },
    "ampere": {
        (2, 64): Blocks(128, 64, 8, 3),
        (2, 128): Blocks(64, 32, 4, 2),
        (2, 256): Blocks(32, 32, 4, 2),
        (4, 64): Blocks(64, 16, 8, 2),
        (4, 128): Blocks(16, 16, 8, 2),
        (4, 256): Blocks(16, 16, 8, 2),
    },
    "least": {
        (2, 64): Blocks(64, 32, 4, 2),
        (2, 128): Blocks(32, 32, 4, 2),
        (2, 256): Blocks(16, 16, 4, 2),
        (4, 64): Blocks(32, 16, 4, 2),
        (4, 128): Blocks(16, 16, 8, 2),
        (4, 256): Blocks(16, 16, 8, 1),
    },
}
ATTENTION_TANGENT["blackwell"] = ATTENTION_TANGENT["hopper"]


def attention_blocks(table: dict, q: torch.Tensor, v: torch.Tensor) -> Blocks:
    """The entry of one of the tables above for these queries and values; ValueError above head size 256."""
    if max(q.shape[-1], v.shape[-1]) > 256:
        raise ValueError(f"head size is {q.shape[-1]} for queries and {v.shape[-1]} for values, expected at most 256")
    padded = max(64, triton.next_power_of_2(max(q.shape[-1], v.shape[-1])))
    return table[generation(q.device)][q.element_size(), padded]


def precision(tensor: torch.Tensor, allow_tf32: bool) -> str:
    """How float32 factors are multiplied: rounded to TF32 where that is allowed; else in three products of their TF32
    parts, on tensor cores, or where there are none on ordinary ones. Of other factors nothing is rounded."""
    if tensor.dtype != torch.float32 or hardware(tensor.device).architecture < 80:
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def options(num_warps: int = 4, num_stages: int = 3) -> dict:
    """What a launch is told beside its arguments. From 3.10 on Triton rounds a · b + c twice unless asked not to, which
    takes 8% more instructions."""
    return dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
