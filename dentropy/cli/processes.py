"""One process of several, as torchrun starts them: each runs its part, and the first alone speaks and writes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does."""


def count() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_first() -> bool:
    return count() == 1 or os.environ["RANK"] == "0"


def own_device(device: str | None) -> str | None:
    """Of several processes on a node each has the card of its number where `device` does not say which."""
    import torch

    if count() == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside, so that what is finished is kept and told of."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
