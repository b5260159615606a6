"""Checks of what callers hand in, shared by the reference and the kernels' dispatch.

Every function raises ValueError that names the argument, what it was and what was expected, and otherwise
returns nothing (or the argument in the form that the computation wants).
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_tensor(name: str, value, shape: tuple[int | None, ...], expected: str, dtypes=FLOATS, device=None) -> None:
    """`value` is a tensor of `shape` (None: any size), of one of `dtypes`, on `device` (None: any)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a torch.Tensor of shape {expected}")
    fits = value.dim() == len(shape) and all(want in (None, size) for want, size in zip(shape, value.shape))
    if not fits:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {expected}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} has dtype {value.dtype}, expected one of {names}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device}, where the other inputs are")


def check_targets(targets, rows: int, vocabulary: int | Tensor, device: torch.device, validate: bool) -> None:
    """Shape, dtype and device always; values on the CPU, elsewhere only with `validate` (it synchronizes)."""
    check_tensor("targets", targets, (rows,), f"[{rows}], one token id per row", INTEGERS, device)
    if not (validate or device.type == "cpu"):
        return
    outside = (targets < 0) | (targets >= vocabulary)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(f"targets[{row}] is {int(targets[row])}, expected a token id in [0, {int(vocabulary)})")


def check_transform(temperature: float, softcap: float | None) -> None:
    """Sampling temperature and softcap are positive finite numbers (softcap: or None)."""
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if name == "softcap" and value is None:
            continue
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ValueError(
                f"{name} is {value!r}, expected a finite number above 0" + (" or None" if name == "softcap" else "")
            )


def check_logits(logits, targets, dlogits, d2logits, temperature, softcap, validate: bool) -> None:
    """The arguments of `token_stats`."""
    check_tensor("logits", logits, (None, None), "[N, V], one row per token")
    rows, vocabulary = logits.shape
    if vocabulary == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected a vocabulary of at least 1")
    for name, value in (("dlogits", dlogits), ("d2logits", d2logits)):
        if value is not None:
            check_tensor(name, value, (rows, vocabulary), f"{[rows, vocabulary]} as logits", device=logits.device)
    if d2logits is not None and dlogits is None:
        raise ValueError("dlogits is None, expected a tensor beside d2logits, whose order needs the first")
    check_transform(temperature, softcap)
    check_targets(targets, rows, vocabulary, logits.device, validate)


def check_linear(hidden, weight, dhidden, dweight, bias, dbias, temperature, softcap) -> None:
    """The arguments of `linear_token_stats` but for targets."""
    check_tensor("hidden", hidden, (None, None), "[N, D], one row per token")
    rows, width = hidden.shape
    check_tensor("weight", weight, (None, width), f"[V, {width}], the width of hidden", device=hidden.device)
    vocabulary = len(weight)
    if vocabulary == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected a vocabulary of at least 1")
    for name, value, shape, like in (
        ("dhidden", dhidden, (rows, width), "hidden"),
        ("dweight", dweight, (vocabulary, width), "weight"),
        ("bias", bias, (vocabulary,), "the rows of weight"),
        ("dbias", dbias, (vocabulary,), "the rows of weight"),
    ):
        if value is not None:
            check_tensor(name, value, shape, f"{list(shape)} as {like}", device=hidden.device)
    check_transform(temperature, softcap)


def checked_cu_seqlens(cu_seqlens, tokens: int) -> np.ndarray:
    """`cu_seqlens` as a NumPy int64 array [S + 1] that starts at 0, never decreases and ends at `tokens`."""
    ends = cu_seqlens.detach().cpu().numpy() if isinstance(cu_seqlens, Tensor) else np.asarray(cu_seqlens)
    if ends.ndim != 1 or len(ends) == 0:
        raise ValueError(f"cu_seqlens has shape {list(ends.shape)}, expected [S + 1]")
    if ends.dtype not in (np.int32, np.int64):
        raise ValueError(f"cu_seqlens has dtype {ends.dtype}, expected int32 or int64")
    if ends[0] != 0 or ends[-1] != tokens:
        raise ValueError(f"cu_seqlens goes from {ends[0]} to {ends[-1]}, expected 0 to {tokens}, the number of tokens")
    falls = np.flatnonzero(ends[1:] < ends[:-1])
    if len(falls):
        i = int(falls[0])
        raise ValueError(
            f"cu_seqlens falls from {ends[i]} to {ends[i + 1]} at index {i + 1}, expected it never to decrease"
        )
    return ends.astype(np.int64, copy=False)


def checked_group(group, sequences: int) -> np.ndarray:
    """`group` as a NumPy int64 array [S]; None gives every sequence a group of its own."""
    if group is None:
        return np.arange(sequences)
    group = group.detach().cpu().numpy() if isinstance(group, Tensor) else np.asarray(group)
    if group.shape != (sequences,):
        raise ValueError(f"group has shape {list(group.shape)}, expected [{sequences}], one entry per sequence")
    if sequences and group.dtype.kind not in "iu":
        raise ValueError(f"group has dtype {group.dtype}, expected integers")
    return group.astype(np.int64)
