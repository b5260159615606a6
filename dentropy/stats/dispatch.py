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
    if not (given[0].is_cuda or (given[0].is_cpu and _asked_to_interpret())) or not _triton_is_installed():
        return False
    if given[0].is_cpu:
        _check_interpreter()
    return float64 or all(tensor.dtype != torch.float64 for tensor in given)


def _asked_to_interpret() -> bool:
    """The variable's values are Triton's."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _check_interpreter() -> None:
    """Triton settles between compiling and interpreting as it is imported."""
    from triton.language import standard
    from triton.runtime.jit import JITFunction

    if isinstance(standard.sum, JITFunction):
        raise RuntimeError("TRITON_INTERPRET: set after Triton was imported, expected before Python starts")


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
