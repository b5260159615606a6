"""Which implementation serves a call: the Triton kernels or the plain one."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def kernels_serve(*tensors: Tensor | None, float64: bool = False) -> bool:
    """Whether the Triton kernels take these: on CUDA or, under Triton's interpreter, the CPU.

    None is nothing given. Most kernels compute in float32 and leave float64 inputs to the plain
    implementation; float64=True is for one that takes them.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_device = given[0].is_cuda or (given[0].is_cpu and interpreted)
    in_precision = float64 or all(tensor.dtype != torch.float64 for tensor in given)
    return on_device and in_precision and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
