"""The columns of a batch, checked: token ids, masks, groups, temperatures, and numbers per rollout or per token."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from torch import Tensor

from dentropy import large
from dentropy.doors import third_party
from dentropy.rollouts.readers import LARGEST_ID, is_number

TEMPERATURES = (1e-6, 1e6)  # logits divided by less could leave float32
ROUNDED = 1e-3  # by how much rounding may take a log-probability above 0


def array(values, argument: str) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    with third_party(f"{argument}: no array", "a list of numbers or lists of one length"):
        return np.asarray(values)


def token_ids(ids, name: str, i: int) -> np.ndarray:
    """Integers [n]; ValueError naming `name[i]` for what is no flat sequence of token ids."""
    ids = array(ids, f"{name}[{i}]")
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"{name}[{i}]: {ids.dtype} of shape {ids.shape}, expected a flat sequence of token ids")
    if ids.size and (ids.min() < 0 or ids.max() > LARGEST_ID):
        outside = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{name}[{i}]: token id {outside} is outside the vocabulary, expected ids from 0")
    return ids if ids.dtype == np.int32 else ids.astype(np.int64, copy=False)


def end_to_end(rows: Iterable[np.ndarray], n: int, dtype) -> np.ndarray:
    """All of them in one array, [n]."""
    found, place = large.empty(n, dtype), 0
    for row in rows:
        found[place : place + len(row)] = row
        place += len(row)
    return found


def loss_mask(mask, i: int, n: int) -> np.ndarray:
    """bool [n], which tokens of row i were generated: not its first, which no position predicts."""
    mask = array(mask, f"loss_mask[{i}]")
    if mask.shape != (n,):
        raise ValueError(f"loss_mask[{i}]: shape {mask.shape}, expected one flag for each of the row's {n} tokens")
    if mask.size and mask.dtype != bool and (mask.dtype.kind not in "iuf" or not np.isin(mask, (0, 1)).all()):
        raise ValueError(f"loss_mask[{i}]: {mask.dtype} values other than 0 and 1, expected 1 where a token counts")
    if mask[:1].any():
        raise ValueError(
            f"loss_mask[{i}]: 1 at the row's first token, which nothing predicts, expected a given token before "
            "the first generated one (a start token will do)"
        )
    return mask.astype(bool, copy=False)


def groups(group: Sequence, n: int) -> np.ndarray:
    labels = list(np.asarray(group).tolist() if isinstance(group, (np.ndarray, Tensor)) else group)
    if len(labels) != n:
        raise ValueError(f"group: {len(labels)} labels, expected one per rollout, {n}")
    if all(isinstance(label, (int, np.integer)) and -LARGEST_ID <= label <= LARGEST_ID for label in labels):
        return np.array(labels, dtype=np.int64)
    if not all(isinstance(label, Hashable) and label == label for label in labels):
        raise ValueError("group: labels of the kind of a list or NaN, expected integers or text")
    number: dict = {}
    return np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.int64)


def numbers(name: str, values, n: int, each: str) -> np.ndarray:
    """float64 [n], finite; `each` says of what there are n."""
    values = array(values, name)
    if values.dtype == object and all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in values.flat):
        values = values.astype(np.float64)  # integers beyond 64 bits
    if values.dtype.kind not in "biuf":  # text would be read as the numbers it spells
        raise ValueError(f"{name}: {values.dtype} values, expected one number per {each}")
    values = values.astype(np.float64)
    if values.shape != (n,):
        raise ValueError(f"{name}: shape {values.shape}, expected one number per {each}, [{n}]")
    if not np.isfinite(values).all():
        i = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}[{i}]: {values[i]}, expected a finite number")
    return values


def per_token(name: str, values, lengths: np.ndarray) -> np.ndarray:
    """float64 [n_tokens], packed, from these or from one sequence of `lengths`[i] numbers for each rollout."""
    if not _nested(values):
        return numbers(name, values, int(lengths.sum()), "generated token")
    if len(values) != len(lengths):
        raise ValueError(f"{name}: {len(values)} lists of numbers, expected one per rollout, {len(lengths)}")
    rows = (numbers(f"{name}[{i}]", row, int(lengths[i]), "generated token") for i, row in enumerate(values))
    return end_to_end(rows, int(lengths.sum()), np.float64)


def advantages(values, lengths: np.ndarray) -> np.ndarray:
    """float64 [S], one for each rollout, or [n_tokens], one for each generated token.

    ValueError for the latter where it looks like the former: as many rollouts as generated tokens, some without any.
    """
    n, n_tokens = len(lengths), int(lengths.sum())
    if not _nested(values):
        values = array(values, "advantage")
        if n_tokens != n and values.shape == (n_tokens,):
            return numbers("advantage", values, n_tokens, "generated token")
        return numbers("advantage", values, n, f"rollout (or per generated token, [{n_tokens}])")
    found = per_token("advantage", values, lengths)
    if n_tokens == n and (lengths != 1).any():
        raise ValueError(
            f"advantage: one per generated token, of which there are as many as rollouts, {n}: they could not be told "
            "from one per rollout, expected a batch without rollouts that have no generated token"
        )
    return found


def sampler_logps(values, lengths: np.ndarray) -> np.ndarray:
    """float64 [n_tokens], none above 0 by more than rounding, as probabilities would be."""
    found = per_token("sampler_logp", values, lengths)
    if (found > ROUNDED).any():
        at = int(np.argmax(found > ROUNDED))
        raise ValueError(f"sampler_logp: {found[at]} at generated token {at}, expected log-probabilities, at most 0")
    return found


def temperatures(temperature, n: int) -> float | np.ndarray:
    """The one of all rollouts, or float64 [n] where they differ."""
    if not _sequence(temperature):
        return checked_temperature(temperature)
    values = temperature.tolist() if isinstance(temperature, (np.ndarray, Tensor)) else list(temperature)
    if len(values) != n:
        raise ValueError(f"temperature: {len(values)} of them, expected one per rollout, {n}")
    return common([checked_temperature(value, f"temperature[{i}]") for i, value in enumerate(values)])


def common(temperature: Sequence[float]) -> float | np.ndarray:
    """The value that all have, or float64 [S] of them."""
    found = np.asarray(temperature, dtype=np.float64)
    return float(found[0]) if (found == found[0]).all() else found


def checked_temperature(temperature, name: str = "temperature") -> float:
    low, high = TEMPERATURES
    if not is_number(temperature) or not low <= temperature <= high:
        raise ValueError(f"{name}: {temperature!r:.40}, expected a positive number, from {low:g} to {high:g}")
    return float(temperature)


def _sequence(values) -> bool:
    return isinstance(values, (list, tuple)) or (isinstance(values, (np.ndarray, Tensor)) and values.ndim > 0)


def _nested(values) -> bool:
    """Whether numbers come as a sequence for each rollout."""
    return _sequence(values) and len(values) > 0 and _sequence(values[0])
