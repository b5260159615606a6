"""What callers hand in, checked: by the public functions, the plain path and the reference alike.

Every function raises ValueError, "argument: what it was, expected what", and otherwise returns nothing (or the argument
in the form that the computation wants).
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from dentropy.stats.tables import TokenStats

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_tensor(name: str, value, shape: tuple[int | None, ...], expected: str, dtypes=FLOATS, device=None) -> None:
    """`value` is a tensor of `shape` (None: any size), of one of `dtypes`, on `device` (None: any)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: a {type(value).__name__}, expected a torch.Tensor of shape {expected}")
    fits = value.dim() == len(shape) and all(want in (None, size) for want, size in zip(shape, value.shape))
    if not fits:
        raise ValueError(f"{name}: shape {list(value.shape)}, expected {expected}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: dtype {value.dtype}, expected one of {names}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: on {value.device}, expected {device}, where the other inputs are")


def check_vocabulary(name: str, value: Tensor, vocabulary: int) -> None:
    """The vocabulary that a tensor brings has a token."""
    if vocabulary == 0:
        raise ValueError(f"{name}: shape {list(value.shape)}, expected a vocabulary of at least 1")


def check_targets(targets, n_rows: int, vocabulary: int | Tensor, device: torch.device, validate: bool) -> None:
    """Shape, dtype and device always; values on the CPU, elsewhere only with `validate` (it synchronizes)."""
    check_tensor("targets", targets, (n_rows,), f"[{n_rows}], one token id per row", INTEGERS, device)
    if not (validate or device.type == "cpu"):
        return
    outside = (targets < 0) | (targets >= vocabulary)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(f"targets[{row}]: {int(targets[row])}, expected a token id in [0, {int(vocabulary)})")


def check_transform(temperature: float, softcap: float | None) -> None:
    """Sampling temperature and softcap are positive finite numbers (softcap: or None)."""
    for name, value, alternative in (("temperature", temperature, ""), ("softcap", softcap, " or None")):
        if value is None and alternative:
            continue
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: {value!r}, expected a finite number above 0{alternative}")


def check_logits(logits, targets, dlogits, d2logits, temperature, softcap, validate: bool) -> None:
    """The arguments of `token_stats`."""
    check_tensor("logits", logits, (None, None), "[N, V], one row per token")
    n_rows, vocabulary = logits.shape
    check_vocabulary("logits", logits, vocabulary)
    for name, value in (("dlogits", dlogits), ("d2logits", d2logits)):
        if value is not None:
            check_tensor(name, value, (n_rows, vocabulary), f"{[n_rows, vocabulary]} as logits", device=logits.device)
    if d2logits is not None and dlogits is None:
        raise ValueError("dlogits: None, expected a tensor beside d2logits, whose order needs the first")
    check_transform(temperature, softcap)
    check_targets(targets, n_rows, vocabulary, logits.device, validate)


def check_linear(hidden, weight, dhidden, dweight, bias, dbias, temperature, softcap) -> None:
    """The arguments of `linear_token_stats` but for targets."""
    check_tensor("hidden", hidden, (None, None), "[N, D], one row per token")
    n_rows, width = hidden.shape
    check_tensor("weight", weight, (None, width), f"[V, {width}], the width of hidden", device=hidden.device)
    vocabulary = len(weight)
    check_vocabulary("weight", weight, vocabulary)
    for name, value, shape, like in (
        ("dhidden", dhidden, (n_rows, width), "hidden"),
        ("dweight", dweight, (vocabulary, width), "weight"),
        ("bias", bias, (vocabulary,), "the rows of weight"),
        ("dbias", dbias, (vocabulary,), "the rows of weight"),
    ):
        if value is not None:
            check_tensor(name, value, shape, f"{list(shape)} as {like}", device=hidden.device)
    check_transform(temperature, softcap)


def check_stats(stats) -> None:
    """`stats` is a TokenStats of tensors of one length [N]; each order is there whole or not at all, `fisher` only
    beside the first."""
    if not isinstance(stats, TokenStats):
        raise ValueError(f"stats: a {type(stats).__name__}, expected a TokenStats")
    check_tensor("stats.logp", stats.logp, (None,), "[N], one value per token")
    shape, device = tuple(stats.logp.shape), stats.logp.device
    for name, value in stats._asdict().items():
        if name == "entropy" or value is not None:
            check_tensor(f"stats.{name}", value, shape, f"{list(shape)} as stats.logp", device=device)
    for first, second in (("dlogp", "dentropy"), ("d2logp", "d2entropy")):
        if (getattr(stats, first) is None) != (getattr(stats, second) is None):
            raise ValueError(f"stats.{first} and stats.{second}: one is None, expected both or neither")
    for beside in ("d2logp", "fisher"):
        if getattr(stats, beside) is not None and stats.dlogp is None:
            raise ValueError(f"stats.dlogp: None, expected a tensor beside stats.{beside}")


def checked_cu_seqlens(cu_seqlens, n_tokens: int) -> np.ndarray:
    """`cu_seqlens` as a NumPy int64 array [S + 1] that starts at 0, never decreases and ends at `n_tokens`."""
    ends = cu_seqlens.detach().cpu().numpy() if isinstance(cu_seqlens, Tensor) else np.asarray(cu_seqlens)
    if ends.ndim != 1 or len(ends) == 0:
        raise ValueError(f"cu_seqlens: shape {list(ends.shape)}, expected [S + 1]")
    if ends.dtype not in (np.int32, np.int64):
        raise ValueError(f"cu_seqlens: dtype {ends.dtype}, expected int32 or int64")
    if ends[0] != 0 or ends[-1] != n_tokens:
        raise ValueError(f"cu_seqlens: from {ends[0]} to {ends[-1]}, expected 0 to {n_tokens}, the number of tokens")
    falls = np.flatnonzero(ends[1:] < ends[:-1])
    if len(falls):
        i = int(falls[0])
        raise ValueError(f"cu_seqlens[{i + 1}]: {ends[i + 1]}, expected at least the {ends[i]} before it")
    return ends.astype(np.int64, copy=False)


def checked_group(group, n_sequences: int) -> np.ndarray:
    """`group` as a NumPy int64 array [S]; None gives every sequence a group of its own."""
    if group is None:
        return np.arange(n_sequences)
    group = group.detach().cpu().numpy() if isinstance(group, Tensor) else np.asarray(group)
    if group.shape != (n_sequences,):
        raise ValueError(f"group: shape {list(group.shape)}, expected [{n_sequences}], one entry per sequence")
    if n_sequences and group.dtype.kind not in "iu":
        raise ValueError(f"group: dtype {group.dtype}, expected integers")
    return group.astype(np.int64)


class NotFiniteError(ValueError):
    """Sums that are not finite, of all `rollouts` [n], int64; the message names the first."""

    def __init__(self, message: str, rollouts: np.ndarray):
        super().__init__(message)
        self.rollouts = rollouts


def check_sums(columns: dict[str, np.ndarray], stats: TokenStats, ends: np.ndarray) -> None:
    """Sums of `stats` are finite; looks at tokens only where one is not, as it is where any of its tokens is not."""
    for name, column in columns.items():
        bad = np.flatnonzero(~np.isfinite(column))
        if len(bad) == 0:
            continue
        rollout = int(bad[0])
        was, expected = f"{column[rollout]} summed over its tokens", "a finite number"
        if name in stats._fields:
            values = getattr(stats, name)[ends[rollout] : ends[rollout + 1]].detach().cpu().double().numpy()
            tokens = np.flatnonzero(~np.isfinite(values))
            if len(tokens):
                was, expected = f"{values[tokens[0]]} at token {tokens[0]}", "finite numbers"
        raise NotFiniteError(
            f"{name} of rollout {rollout}: {was}, expected {expected}", _not_finite(columns, stats, ends)
        )


def _not_finite(columns: dict[str, np.ndarray], stats: TokenStats, ends: np.ndarray) -> np.ndarray:
    """The rollouts with tokens that are not finite, int64 [n]; without any, those whose sums are not. (Sums that run
    over all tokens spread what is not finite to the rollouts behind it.)"""
    tokens = np.logical_or.reduce([~torch.isfinite(x.detach()).cpu().numpy() for x in stats if x is not None])
    found = np.unique(np.searchsorted(ends, np.flatnonzero(tokens), side="right") - 1)
    if len(found):
        return found
    return np.flatnonzero(~np.logical_and.reduce([np.isfinite(column) for column in columns.values()]))
