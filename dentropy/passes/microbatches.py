"""Microbatches: which rollouts run together, how many tokens that may be, and what happens where memory runs out.

Rollouts are packed end to end, so nothing is padded: the longest that is left, then again and again the longest that
still fits. That is first-fit decreasing, one microbatch at a time, so that the budget may change on the way. Lengths
within a microbatch are much alike, and a rollout that is too long for the machine fails first, not after hours.
Several ranks run the same microbatches as one process does, so that tables do not depend on their number.

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
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from dentropy import large
from dentropy.model.memory import free_memory, is_out_of_memory
from dentropy.model.packed_row import PackedRow, to_device
from dentropy.passes import ranks
from dentropy.passes.finished import Finished, Walk, digest_of, key_of, next_walk
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

    @property
    def measures(self) -> bool:
        """Whether the next microbatch settles it."""
        return self._measures

    def set_to(self, tokens: int) -> None:
        """What another rank, or an earlier run of the same pass, has found."""
        self.tokens, self._measures = tokens, False

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
    batch: PackedBatch,
    budget: TokenBudget,
    run: Callable[[Microbatch], Result],
    *,
    shared: bool = False,
    idle: Callable[[Microbatch], object] | None = None,
    in_unison: bool = False,
) -> Iterator[tuple[Microbatch, Result | None]]:
    """(microbatch, run(microbatch)), for microbatches that hold every rollout with generated tokens once.

    They are those of one process, whatever the number of ranks: each rank runs one of the next ones. With `shared` a
    result is the statistics of the microbatch's tokens: every rank gets all of them, and a store that is open
    (`finished.keeping`) has them before the next ones begin, or has had them already. Without, a rank gets None for
    what another has run.

    `idle` is for ranks that must run as many microbatches as the others, since they gather sharded weights together:
    what a rank does, in place of `run`, with a microbatch that another one counts. `in_unison` is for ranks that share
    every product: all of them `run` each microbatch, and each gets its own result of it, of statistics the first one's.
    Memory that runs out is then an error.

    Where `run` runs out of memory the budget is halved and its rollouts wait for another microbatch, so `run` must
    leave nothing behind but what it returns; that is not held on to.

    Raises MemoryError, naming the rollout and its length, where a rollout does not fit alone; ValueError where ranks
    differ in their rollouts or budgets.
    """
    waiting = _Waiting(batch)
    kept, known = _begin(batch, budget, shared)
    while waiting:
        taken = [waiting.take(budget.tokens)]
        found = known.pop(taken[0].key, None)
        at_once = 1 if in_unison or budget.measures else ranks.count()
        while found is None and waiting and len(taken) < at_once:
            taken.append(waiting.take(budget.tokens))
        microbatches = [Microbatch.of(batch, one.rollouts, budget.device) for one in taken]
        if found is None:
            shortages, results = _run_on_ranks(taken, microbatches, budget, run, idle, in_unison, kept, shared)
        else:
            budget.set_to(found.tokens)
            shortages = [None if found.stats is not None else "as before"]
            results = [None if found.stats is None else _moved(found.stats, budget.device)]
        for number, shortage in enumerate(shortages):
            if shortage is None:
                yield microbatches[number], results.pop(0)
                continue
            if len(taken[number].items) == 1:
                raise MemoryError(
                    f"rollout {taken[number].rollouts[0]}: its {taken[number].size:,} tokens do not fit into memory "
                    f"even alone; expected shorter rollouts, a smaller dtype or more memory ({shortage})"
                )
            budget.lower(taken[number].size)
            waiting.put_back(taken[number:])  # those behind it were chosen at the budget of before
            break


def _begin(batch: PackedBatch, budget: TokenBudget, shared: bool) -> tuple[Walk | None, dict[str, Finished]]:
    """This walk's place in the store, None without one, and what is there, the same on all ranks."""
    kept = next_walk() if shared else None
    if kept is None and ranks.count() == 1:
        return None, {}
    digest = f"{digest_of(batch)} {budget.tokens}"
    said = ranks.exchange((digest, {} if kept is None else kept.open(digest)))
    if any(other != digest for other, _ in said):
        raise ValueError(
            f"batch: the {len(said)} ranks have different rollouts or token budgets, expected the same on all of them "
            "(each then runs its part)"
        )
    return kept, said[0][1]


def _run_on_ranks(
    taken: list["_Taken"],
    microbatches: list[Microbatch],
    budget: TokenBudget,
    run,
    idle,
    in_unison: bool,
    kept: Walk | None,
    shared: bool,
) -> tuple[list[str | None], list]:
    """Runs one microbatch on each rank, the same on all in unison and while the budget is to be measured. For each
    microbatch: the allocator's message where memory ran out, and the result, as in `walk`."""
    measures, results = budget.measures, []
    mine = 0 if measures or in_unison else ranks.rank()
    shortage = None
    if in_unison:
        results.append(_in_lockstep(budget, taken[0].size, run, microbatches[0]))
    elif idle is not None:
        at = min(mine, len(taken) - 1)
        counts = ranks.rank() == mine if measures else at == mine
        found = _in_lockstep(budget, taken[at].size, run if counts else idle, microbatches[at])
        results += [found] if counts else []
    elif mine < len(taken):
        shortage = _attempt(budget, taken[mine].size, run, microbatches[mine], results)
    if ranks.count() == 1 and kept is None:
        return [shortage], results
    speaks = results and (ranks.rank() == 0 or not in_unison)
    stats = _moved(results.pop(), torch.device("cpu")) if shared and speaks else None
    said = ranks.exchange((shortage, budget.tokens, stats))
    if measures:  # every rank has an opinion, and the least memory decides
        budget.set_to(min(tokens for _, tokens, _ in said))
        said[0] = (next((one for one, _, _ in said if one is not None), None), budget.tokens, said[0][2])
    said = said[: len(taken)]
    shortages = [short for short, _, _ in said]
    if shared:
        if kept is not None:
            _keep(kept, taken, said, budget)
        return shortages, [_moved(stats, budget.device) for short, _, stats in said if short is None]
    own = results if in_unison or ranks.rank() == mine else []
    ran = [number for number, short in enumerate(shortages) if short is None]
    return shortages, [own.pop() if own and number == mine else None for number in ran]


def _keep(kept: Walk, taken: list["_Taken"], said: list[tuple], budget: TokenBudget) -> None:
    """What this round leaves behind: the microbatches up to the first that did not fit, and that it did not."""
    done: dict[str, Finished] = {}
    for one, (shortage, _, stats) in zip(taken, said, strict=True):
        if shortage is None:
            done[one.key] = Finished(stats, budget.tokens)
            continue
        if len(one.items) > 1:
            done[one.key] = Finished(None, budget.tokens)
        break
    kept.write(done)


def _moved(stats: TokenStats, device: torch.device) -> TokenStats:
    return TokenStats(*(None if x is None else x.to(device) for x in stats))


class _Taken(NamedTuple):
    """(length, rollout) of one microbatch, and the temperature they have in common."""

    temperature: float
    items: list[tuple[int, int]]

    @property
    def rollouts(self) -> np.ndarray:
        return np.array([i for _, i in self.items])

    @property
    def size(self) -> int:
        return sum(length for length, _ in self.items)

    @property
    def key(self) -> str:
        return key_of(self.rollouts)


class _Waiting:
    """The rollouts with generated tokens that no microbatch holds yet."""

    def __init__(self, batch: PackedBatch):
        rollouts = np.flatnonzero(batch.response_lens)
        columns = (batch.row_lens[rollouts].tolist(), rollouts.tolist())
        self._queues: dict[float, list[tuple[int, int]]] = {}  # by temperature, ascending
        for temperature, length, i in sorted(zip(batch.temperatures[rollouts].tolist(), *columns, strict=True)):
            self._queues.setdefault(temperature, []).append((length, i))

    def __bool__(self) -> bool:
        return bool(self._queues)

    def take(self, budget: int) -> _Taken:
        """The next microbatch of so many tokens."""
        temperature = max(self._queues, key=lambda key: self._queues[key][-1])
        waiting = self._queues[temperature]
        taken = _take(waiting, budget)
        if not waiting:
            del self._queues[temperature]
        return _Taken(temperature, taken)

    def put_back(self, taken: Iterable[_Taken]) -> None:
        """As if they had not been taken."""
        for one in taken:
            self._queues[one.temperature] = sorted(self._queues.get(one.temperature, []) + one.items)


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


def _in_lockstep(budget: TokenBudget, size: int, run, microbatch: Microbatch):
    """`run` where the other ranks run too, and none can go on without this one."""
    with ranks.lockstep():
        try:
            with budget.trial(size):
                return run(microbatch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise MemoryError(
                f"token_budget: {size:,} tokens do not fit into memory on rank {ranks.rank()}, and with sharded "
                f"weights no rank can go on with fewer by itself; expected {max(1, size // 2):,} or less, or shorter "
                f"rollouts ({reason})"
            ) from error


def in_rollout_order(
    walked: Iterable[tuple[Microbatch, TokenStats]], n_tokens: int, progress: Callable[[int], None] | None
) -> TokenStats:
    """The token statistics of all microbatches of a walk over so many generated tokens, in the order of the batch."""
    columns: list[torch.Tensor | None] | None = None
    for microbatch, stats in walked:
        if columns is None:
            columns = [None if x is None else large.column(n_tokens, x) for x in stats]
        places = to_device(microbatch.places, stats.logp.device)
        for column, values in zip(columns, stats, strict=True):
            if column is not None:
                column[places] = values
        if progress is not None:
            progress(len(microbatch.places))
    return TokenStats(*columns)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ..., lengths[0] of them, then the same from starts[1], and so on."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
