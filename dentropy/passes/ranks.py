"""The processes that share a pass: the ranks of PyTorch's process group where there is one, else this process alone.

All of them hold the whole policy and the whole batch, run every pass together and end with the same result. There is
one way to talk, `exchange`, and a rank that fails talks too: its error is what the others get at their next exchange,
so that none waits for one that is gone.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dentropy.doors import is_refusal

# Elements that are summed over ranks at a time: of each rank's 64 MiB in float32.
CHUNK = 2**24
# Errors that are raised as they were on another rank; what is none of these is a bug, and comes with its traceback.
KINDS = {kind.__name__: kind for kind in (ValueError, MemoryError, OSError)}

Value = TypeVar("Value")

_in_lockstep: ContextVar[bool] = ContextVar("whether ranks wait for each other here", default=False)


class _Failure(NamedTuple):
    kind: str
    text: str


def count() -> int:
    """How many ranks share the passes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def exchange(value: Value) -> list[Value]:
    """The `value` of every rank, on every rank, in their order. All of them must come here.

    Raises what another rank has failed with.
    """
    if count() == 1:
        return [value]
    found = _gathered((None, value))
    for number, (failure, _) in enumerate(found):
        if failure is not None:
            raise _told(failure, number)
    return [value for _, value in found]


def agree(argument: str, value) -> None:
    """ValueError naming the argument where ranks have other values than this one. All of them must come here."""
    said = exchange(value)
    if any(other != value for other in said):
        raise ValueError(f"{argument}: not the same on the {len(said)} ranks, expected the same on each")


def together(function: Callable) -> Callable:
    """`function`, called by all ranks; what one of them fails with ends it on all of them."""

    @wraps(function)
    def called(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            tell(error)
            raise

    return called


@contextmanager
def in_step() -> Iterator[None]:
    """What is inside ends on all ranks before any goes on; what one of them fails with, all of them get."""
    try:
        yield
        exchange(None)
    except Exception as error:
        tell(error)
        raise


def tell(error: Exception) -> None:
    """The other ranks what this one fails with, unless they know."""
    if count() == 1 or knows(error) or hasattr(error, "dentropy_in_lockstep") or _in_lockstep.get():
        return
    kind = next((name for name, kind in KINDS.items() if isinstance(error, kind)), "")
    if kind == "ValueError" and not is_refusal(error):
        kind = ""
    text = str(error) if kind else "".join(traceback.format_exception(error))
    try:
        _gathered((_Failure(kind, text), None))
    except RuntimeError as lost:  # the others are gone: this rank's error is the one to be seen
        error.add_note(f"(the other ranks could not be told: {str(lost).splitlines()[0]})")
        error.dentropy_told = False
    else:
        error.dentropy_told = True


@contextmanager
def lockstep() -> Iterator[None]:
    """Around work in the middle of which ranks wait for each other (sharded weights). One that fails there cannot tell
    the others, who would take it for their next exchange, and leaves: the command's process group, or what started the
    ranks, then ends all of them."""
    token = _in_lockstep.set(True)
    try:
        yield
    except Exception as error:
        error.dentropy_in_lockstep = True
        error.dentropy_told = knows(error)
        raise
    finally:
        _in_lockstep.reset(token)


def knows(error: BaseException) -> bool:
    """Whether every rank has `error`."""
    return getattr(error, "dentropy_told", False)


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over ranks, added in float64 in their order: the same bits on every rank and every
    time. Where `count()` is 1 nothing happens."""
    if count() == 1:
        return
    exchange(None)  # a rank that has failed says so here: it cannot in the middle of a sum
    for tensor in tensors:
        flat = tensor.contiguous().view(-1)
        # NCCL moves what is on a card; Gloo only what is in host memory.
        on_card = tensor.is_cuda and "nccl" in dist.get_backend()
        for part in flat.split(CHUNK):
            mine = part if on_card else part.cpu()
            parts = [torch.empty_like(mine) for _ in range(count())]
            dist.all_gather(parts, mine, group=None if on_card else _on_host())
            total = parts[0].double()
            for other in parts[1:]:
                total += other
            part.copy_(total)
        tensor.copy_(flat.view(tensor.shape))


def _gathered(item) -> list:
    found = [None] * count()
    dist.all_gather_object(found, item, group=_on_host())
    return found


def _told(failure: _Failure, number: int) -> Exception:
    kind = KINDS.get(failure.kind, RuntimeError)
    error = kind(failure.text if failure.kind else f"rank {number} failed:\n{failure.text}")
    error.dentropy_told = True
    return error


def _on_host():
    """A group of all ranks that moves what is in host memory; None is the default group, where that does."""
    return None if dist.get_backend() == "gloo" else _gloo(dist.group.WORLD)


@cache
def _gloo(world):
    """One for each process group there has been."""
    return dist.new_group(backend="gloo")
