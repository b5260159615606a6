"""Microbatches: which rollouts run together, how many tokens that may be, and what happens where memory runs out.

Rollouts are packed end to end, so nothing is padded: the longest that is left, then again and again the longest that
still fits. That is first-fit decreasing, one microbatch at a time, so that the budget may change on the way. Lengths
within a microbatch are much alike, and a rollout that is too long for the machine fails first, not after hours.

Memory follows given and generated tokens together: activations are linear in them (attention takes its queries in
blocks), and logits, which only generated tokens need, exist a few rows at a time. A microbatch has one temperature.
"""

import gc
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

import numpy as np
import torch

from dentropy.model.memory import free_memory, is_out_of_memory
from dentropy.model.packed_row import PackedRow, to_device
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import TokenStats

AUTO = "auto"
# What "auto" begins with, and stays at on a CPU: matrix products are at full speed there, and more gains nothing.
AUTO_START = 4096
# Of the memory that is free after the first microbatch. The rest is for tokens that cost more than the first ones'
# (experts that many visit, more responses among them), for gaps between blocks, and for the caller's other work.
SAFE_SHARE = 0.8

Result = TypeVar("Result")


class TokenBudget:
    """How many tokens, given and generated, run at a time, `tokens`; it learns from the microbatches that ran.

    request: a number of at least 1, kept until memory runs out, or "auto": AUTO_START tokens and, on CUDA, from the
    second microbatch on what fits into SAFE_SHARE of the free memory at the bytes per token of the first. Measuring
    them resets PyTorch's peak memory statistics of `device`. Anything else is a ValueError.
    """

    def __init__(self, request: int | str, device: torch.device):
        if request != AUTO and (not isinstance(request, Integral) or request < 1):
            raise ValueError(f"token_budget: {request!r}, expected {AUTO!r} or a whole number of at least 1")
        self.tokens = AUTO_START if request == AUTO else int(request)
        self.device = device
        self._measures = request == AUTO and device.type == "cuda"
        self._lowered = False

    @contextmanager
    def trial(self, size: int) -> Iterator[None]:
        """Around the run of a microbatch of `size` tokens: what it needed settles the budget where that is open."""
        if self._measures:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        yield
        if self._measures:
            needed = max(1, torch.cuda.max_memory_allocated(self.device) - before)
            self.tokens = max(1, int(SAFE_SHARE * free_memory(self.device) * size / needed))
            self._measures = False
        if self._lowered:
            warnings.warn(f"token_budget: out of memory, went on with {self.tokens:,} tokens at a time", stacklevel=2)
            self._lowered = False

    def lower(self, size: int) -> None:
        """To half of the `size` tokens that did not fit."""
        self.tokens = max(1, size // 2)
        self._measures, self._lowered = False, True


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Rollouts that run together, int64 [M], sampled at one temperature, and where their generated tokens stand among
    all of the batch's, int64 [N]; in `row` these are the targets, in the same order."""

    rollouts: np.ndarray
    places: np.ndarray
    row: PackedRow
    temperature: float

    @classmethod
    def of(cls, batch: PackedBatch, rollouts: np.ndarray, device: torch.device) -> "Microbatch":
        """Everything is made on the host and then copied. The last token of a rollout predicts nothing and is left
        out; `rollouts` have generated tokens, of one temperature."""
        lengths, tokens = batch.row_lens[rollouts] - 1, batch.tokens.numpy()
        places = _ranges(batch.offsets[rollouts], lengths)  # of what runs; the next token is what each one predicts
        predicts = batch.generated[places + 1]
        row = PackedRow.of(tokens[places], lengths, np.flatnonzero(predicts), tokens[places[predicts] + 1], device)
        among_generated = _ranges(batch.response_offsets[rollouts], batch.response_lens[rollouts])
        return cls(rollouts, among_generated, row, float(batch.temperatures[rollouts[0]]))


def walk(
    batch: PackedBatch, budget: TokenBudget, run: Callable[[Microbatch], Result]
) -> Iterator[tuple[Microbatch, Result]]:
    """(microbatch, run(microbatch)), for microbatches that hold every rollout with generated tokens once.

    Where `run` runs out of memory the budget is halved and its rollouts wait for another microbatch, so `run` must
    leave nothing behind but what it returns; that is not held on to.

    Raises MemoryError, naming the rollout and its length, where a rollout does not fit alone.
    """
    queues = _by_temperature(batch)
    while queues:
        temperature = max(queues, key=lambda key: queues[key][-1])
        waiting = queues[temperature]
        taken = _take(waiting, budget.tokens)
        rollouts, size = np.array([i for _, i in taken]), sum(length for length, _ in taken)
        microbatch, results = Microbatch.of(batch, rollouts, budget.device), []
        shortage = _attempt(budget, size, run, microbatch, results)
        if shortage is None:
            yield microbatch, results.pop()
        elif len(taken) > 1:
            budget.lower(size)
            waiting[:] = sorted(waiting + taken)
        else:
            raise MemoryError(
                f"rollout {rollouts[0]}: its {size:,} tokens do not fit into memory even alone; "
                f"expected shorter rollouts, a smaller dtype or more memory ({shortage})"
            )
        if not waiting:
            del queues[temperature]


def _by_temperature(batch: PackedBatch) -> dict[float, list[tuple[int, int]]]:
    """(length, rollout) of those with generated tokens, ascending, by temperature."""
    rollouts = np.flatnonzero(batch.response_lens)
    columns = (batch.row_lens[rollouts].tolist(), rollouts.tolist())
    queues: dict[float, list[tuple[int, int]]] = {}
    for temperature, length, i in sorted(zip(batch.temperatures[rollouts].tolist(), *columns, strict=True)):
        queues.setdefault(temperature, []).append((length, i))
    return queues


def _take(waiting: list[tuple[int, int]], budget: int) -> list[tuple[int, int]]:
    """Moves a microbatch of (length, rollout) out of `waiting`, which ascends: the longest, then what still fits."""
    taken = [waiting.pop()]
    room = budget - taken[0][0]
    while waiting and waiting[0][0] <= room:
        taken.append(waiting.pop(bisect_right(waiting, room, key=lambda item: item[0]) - 1))
        room -= taken[-1][0]
    return taken


def _attempt(budget: TokenBudget, size: int, run, microbatch: Microbatch, results: list) -> str | None:
    """Appends what `run` returns to `results`; the allocator's message where memory ran out, and then nothing of it
    is left."""
    try:
        with budget.trial(size):
            results.append(run(microbatch))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).strip().partition("\n")[0]
    else:
        return None
    # Only here is the error gone, and with it the frames that held on to the microbatch's tensors.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return message


def in_rollout_order(
    walked: Iterable[tuple[Microbatch, TokenStats]], progress: Callable[[int], None] | None
) -> TokenStats:
    """The token statistics of all microbatches of a walk, put in the order of the batch."""
    parts, places = [], []
    for microbatch, stats in walked:
        parts.append(stats)
        places.append(microbatch.places)
        if progress is not None:
            progress(len(microbatch.places))
    back = to_device(np.argsort(np.concatenate(places)), parts[0].logp.device)
    return TokenStats(*(None if column[0] is None else torch.cat(column)[back] for column in zip(*parts, strict=True)))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ..., lengths[0] of them, then the same from starts[1], and so on."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
