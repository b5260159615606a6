"""The process group of a command, all of whose processes end with the error that one of them fails with.

Where weights are sharded ranks wait for each other everywhere, and none can be told by `ranks.exchange`. The store of
the process group is beside all collectives: the one that fails says there why, and a thread in each of the others looks
for that, and ends its process.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from dentropy.cli.processes import count, is_first
from dentropy.cli.terminal import is_bug
from dentropy.doors import reason

FAILED, SAID = "failed", "said"
INTERVAL, PATIENCE = 0.5, 10.0  # seconds
EXIT_CODE = 2


@contextmanager
def process_group(complain: Callable[[object], None]) -> Iterator[None]:
    """That of all processes, where there are several; an error that one of them has and the others do not know ends
    all of them. `complain` says an error."""
    if count() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    from dentropy.passes import ranks

    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    failing = FailingRank(complain)
    try:
        yield
        ranks.exchange(None)  # none leaves while another is still to write
    except Exception as error:
        if not ranks.knows(error):
            failing.leave(error)
        raise
    finally:
        failing.stop()
        dist.destroy_process_group()


class FailingRank:
    """Looks, from now until `stop`, whether another process has failed; `complain` says an error on the first one."""

    def __init__(self, complain: Callable[[object], None]):
        import torch.distributed as dist

        self._complain, self._done, self._turn = complain, threading.Event(), threading.Lock()
        client = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        # A launcher may start all of them again, and its store stays.
        self._store = dist.PrefixStore(f"dentropy/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", client)
        threading.Thread(target=self._watch, daemon=True).start()

    def leave(self, error: Exception) -> None:
        """Before this process ends with `error`: the others end too. The first says it, this one if that cannot."""
        from dentropy.passes import ranks

        if not self._turn.acquire(blocking=False):  # the thread is about to end this process
            time.sleep(PATIENCE)
        said = f"a bug, with its traceback there: {reason(error)}" if is_bug(error) else str(error)
        said = f"{said} (on rank {ranks.rank()}, {socket.gethostname()})"
        with suppress(RuntimeError):  # without a store every process says what it knows
            self._store.compare_set(FAILED, "", said)
            if is_first():
                self._store.set(SAID, "")
            self._store.wait([SAID], timedelta(seconds=PATIENCE))
            error.dentropy_told = True
            time.sleep(2 * INTERVAL)  # the others look once more before a connection closes, which is an error too

    def stop(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            try:
                failed = self._store.check([FAILED])
            except RuntimeError:  # gone with the process that had it
                if self._done.wait(PATIENCE):
                    return
                os._exit(EXIT_CODE)
            if failed and self._turn.acquire(blocking=False):
                self._end(self._store.get(FAILED).decode())

    def _end(self, said: str) -> None:
        if is_first():
            self._complain(said)
            self._store.set(SAID, "")
            time.sleep(2 * INTERVAL)  # it may have the store that others still look into
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(EXIT_CODE)  # the main thread may wait in a collective that nothing interrupts
