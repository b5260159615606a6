"""Microbatches: which rollouts run together, how many tokens that may be, and what happens where memory runs out.

Rollouts are packed end to end, so nothing is padded: the longest that is left, then again and again the longest that
still fits. That is first-fit decreasing, one microbatch at a time, so that the budget may change on the way. Lengths
within a microbatch are much alike, and a rollout that is too long for the machine fails first, not after hours.

Memory follows the prompt and response tokens together: activations are linear in them (attention takes its queries in
blocks), and logits, which only response tokens need, exist a few rows at a time.
"""

import gc
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dentropy.model.memory import free_memory, is_out_of_memory
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import TokenStats

AUTO = "auto"
# What "auto" begins with, and stays at on a CPU: matrix products are at full speed there, and more gains nothing.
AUTO_START = 4096
# Of the memory that is free after the first microbatch. The rest is for tokens that cost more than the first ones'
# (experts that many visit, more responses among them), for gaps between blocks, and for the caller's other work.
SAFE_SHARE = 0.8


class TokenBudget:
    """How many prompt and response tokens run at a time, `tokens`; it learns from the microbatches that ran.

    request: a number of at least 1, kept until memory runs out, or "auto": AUTO_START tokens and, on CUDA, from the
    second microbatch on what fits into SAFE_SHARE of the free memory at the bytes per token of the first. Measuring
    them resets PyTorch's peak memory statistics of `device`. Anything else is a ValueError.
    """

    def __init__(self, request: int | str, device: torch.device):
        if request != AUTO and (not isinstance(request, Integral) or request < 1):
            raise ValueError(f"token_budget: {request!r}, expected {AUTO!r} or a whole number of at least 1")
        self.tokens = AUTO_START if request == AUTO else int(request)
        self._device = device
        self._measures = request == AUTO and device.type == "cuda"
        self._lowered = False

    @contextmanager
    def trial(self, n_tokens: int) -> Iterator[None]:
        """Around the run of a microbatch of `n_tokens`: what it needed settles the budget where that is open."""
        if self._measures:
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
        yield
        if self._measures:
            needed = max(1, torch.cuda.max_memory_allocated(self._device) - before)
            self.tokens = max(1, int(SAFE_SHARE * free_memory(self._device) * n_tokens / needed))
            self._measures = False
        if self._lowered:
            warnings.warn(f"token_budget: out of memory, went on with {self.tokens:,} tokens at a time", stacklevel=2)
            self._lowered = False

    def lower(self, n_tokens: int) -> None:
        """To half of the `n_tokens` that did not fit."""
        self.tokens = max(1, n_tokens // 2)
        self._measures, self._lowered = False, True


def walk(
    batch: PackedBatch,
    budget: TokenBudget,
    run: Callable[[np.ndarray], Any],
    keep: Callable[[np.ndarray, Any], None],
    progress: Callable[[int], None] | None,
) -> None:
    """keep(rollouts, run(rollouts)) for microbatches that hold every rollout with a response once.

    rollouts: int64 indices into the batch. Where `run` runs out of memory the budget is halved and its rollouts wait
    for another microbatch, so `run` must leave nothing behind but what it returns. progress: called after every
    microbatch with its number of response tokens.

    Raises MemoryError, naming the rollout and its length, where a rollout does not fit alone.
    """
    lengths = batch.prompt_lens + batch.response_lens
    waiting = sorted((int(lengths[i]), i) for i in np.flatnonzero(batch.response_lens).tolist())
    while waiting:
        taken = _take(waiting, budget.tokens)
        rollouts, n_tokens = np.array([i for _, i in taken]), sum(length for length, _ in taken)
        shortage = _attempt(budget, n_tokens, rollouts, run, keep)
        if shortage is None:
            if progress is not None:
                progress(int(batch.response_lens[rollouts].sum()))
        elif len(taken) > 1:
            budget.lower(n_tokens)
            waiting = sorted(waiting + taken)
        else:
            raise MemoryError(
                f"rollout {rollouts[0]}: its {n_tokens:,} tokens do not fit into memory even alone; "
                f"expected shorter rollouts, a smaller dtype or more memory ({shortage})"
            )


def _take(waiting: list[tuple[int, int]], budget: int) -> list[tuple[int, int]]:
    """Moves a microbatch of (length, rollout) out of `waiting`, which ascends: the longest, then what still fits."""
    taken = [waiting.pop()]
    room = budget - taken[0][0]
    while waiting and waiting[0][0] <= room:
        taken.append(waiting.pop(bisect_right(waiting, room, key=lambda item: item[0]) - 1))
        room -= taken[-1][0]
    return taken


def _attempt(budget, n_tokens, rollouts, run, keep) -> str | None:
    """Runs and keeps one microbatch; the allocator's message where memory ran out, and then nothing of it is left."""
    try:
        with budget.trial(n_tokens):
            result = run(rollouts)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).strip().partition("\n")[0]
    else:
        keep(rollouts, result)
        return None
    # Only here is the error gone, and with it the frames that held on to the microbatch's tensors.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return message


def stats_in_rollout_order(
    batch: PackedBatch,
    budget: TokenBudget,
    run: Callable[[np.ndarray], TokenStats],
    progress: Callable[[int], None] | None,
) -> TokenStats:
    """What `run` gives for the response tokens of each microbatch's rollouts, put in the order of the batch."""
    parts: list[TokenStats] = []
    places: list[np.ndarray] = []

    def keep(rollouts: np.ndarray, stats: TokenStats) -> None:
        parts.append(stats)
        places.append(response_places(batch, rollouts))

    walk(batch, budget, run, keep, progress)
    back = torch.from_numpy(np.argsort(np.concatenate(places))).to(parts[0].logp.device)
    return TokenStats(*(None if column[0] is None else torch.cat(column)[back] for column in zip(*parts, strict=True)))


def response_places(batch: PackedBatch, rollouts: np.ndarray) -> np.ndarray:
    """Where the response tokens of `rollouts`, one rollout after the other, stand among all of the batch's."""
    ends = np.cumsum(batch.response_lens)
    return _ranges((ends - batch.response_lens)[rollouts], batch.response_lens[rollouts])


def packed_inputs(batch: PackedBatch, rollouts: np.ndarray, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, cu_seqlens, rows, targets of `rollouts`, which have responses: logits at `rows` of the packed row
    predict `targets`, the response tokens. The last token of a response predicts nothing and is left out."""
    prompts, responses, starts = batch.prompt_lens[rollouts], batch.response_lens[rollouts], batch.offsets[rollouts]
    lengths = prompts + responses - 1
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    inputs, targets = (
        batch.tokens[torch.from_numpy(_ranges(*where))].to(device)
        for where in ((starts, lengths), (starts + prompts, responses))
    )
    rows = _ranges(cu_seqlens[:-1] + prompts - 1, responses)
    return inputs, torch.from_numpy(cu_seqlens).to(device), torch.from_numpy(rows).to(device), targets


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ..., lengths[0] of them, then the same from starts[1], and so on."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
