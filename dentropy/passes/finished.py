"""What finished microbatches gave, kept where a run that is killed finds it again.

A run opens a `Store` with `keeping`; the walks inside it are numbered, and each first takes what the walk of the same
number, over the same rollouts, has left there. Passes know nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import TokenStats


class Finished(NamedTuple):
    """One microbatch: the statistics of its tokens on the CPU, or None where it did not fit into memory; and the token
    budget from there on."""

    stats: TokenStats | None
    tokens: int


class Store(Protocol):
    """Finished microbatches by walk and by `key_of` their rollouts."""

    def read(self, walk: str) -> dict[str, Finished]: ...

    def write(self, walk: str, finished: Mapping[str, Finished]) -> None:
        """All of them or, where the process dies, none."""

    def read_gradient(self) -> list[Tensor] | None: ...

    def write_gradient(self, tensors: Sequence[Tensor]) -> None:
        """That of the update's rollouts, whole or not at all."""


@dataclass
class _Run:
    store: Store
    stage: str
    gradient: bool
    walks: int = 0


_run: ContextVar[_Run | None] = ContextVar("run", default=None)


@contextmanager
def keeping(store: Store | None, stage: str, *, gradient: bool = False) -> Iterator[None]:
    """Walks inside take from `store` and leave there what they finish; None: they do not.

    Args:
        store: of one run: the same policy, rollouts and settings whenever it is opened.
        stage: a name of its own for each part of the run that opens it.
        gradient: keep the gradient of the one reverse pass inside, which need not come out the same again.
    """
    token = _run.set(None if store is None else _Run(store, stage, gradient))
    try:
        yield
    finally:
        _run.reset(token)


@dataclass
class Walk:
    """One walk's part of a store."""

    store: Store
    name: str

    def open(self, digest: str) -> dict[str, Finished]:
        """What is there from the same walk over rollouts and settings of this digest."""
        self.name = f"{self.name} {digest}"
        return self.store.read(self.name)

    def write(self, finished: Mapping[str, Finished]) -> None:
        self.store.write(self.name, finished)


def next_walk() -> Walk | None:
    """The next one's part of the store that is open; None where none is."""
    run = _run.get()
    if run is None:
        return None
    run.walks += 1
    return Walk(run.store, f"{run.stage} {run.walks}")


def gradient_store() -> Store | None:
    """The store that is open, where it keeps the gradient of the reverse pass that begins."""
    run = _run.get()
    return None if run is None or not run.gradient else run.store


def digest_of(batch: PackedBatch) -> str:
    """Of what the passes read of a batch."""
    digest = hashlib.sha256()
    for values in (batch.tokens.numpy(), batch.generated, batch.row_lens, batch.temperatures):
        values = np.ascontiguousarray(values)
        digest.update(f"{values.dtype} {values.shape} ".encode() + values.tobytes())
    return digest.hexdigest()


def key_of(rollouts: np.ndarray) -> str:
    """Of the microbatch of these rollouts."""
    return hashlib.sha256(rollouts.astype(np.int64).tobytes()).hexdigest()
