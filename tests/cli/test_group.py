"""What one of two processes fails with, under --shard: both end with it, at once, and it is said once.

No launcher looks after them here: what ends the other is dentropy's own.
"""

import multiprocessing
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import completed
from models import SAVED_MODULES_LOAD
from torch.distributed.fsdp import FSDPModule

from dentropy import Direction, Policy
from dentropy.cli import main
from dentropy.experiment import resumable
from dentropy.passes import measure

pytestmark = [
    pytest.mark.skipif(not SAVED_MODULES_LOAD, reason="this transformers does not load in parts"),
    pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="what this PyTorch has is refused by name"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process with a card cannot be forked"),
]
WORLD = 2
OPTIONS = "--etas 1e-3 --token-budget 60 --device cpu --shard --quiet --out {}/run"
MOVED = "--direction v.safetensors"


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def cut(name):
    def apply(patch):
        path = Path(name)
        path.write_bytes(path.read_bytes()[:-1000])

    return apply


def patched(owner, name, error):
    return lambda patch: patch.setattr(owner, name, raising(error))


def another_direction(patch):
    Direction({"lm_head.weight": torch.ones(2)}).save("v.safetensors")


SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
BUG = KeyError("a bug")
# name -> the options, the rank that fails, what is done to it (in a folder of its own), what is said.
FAULTS = {
    "policy": (MOVED, 1, cut("before/model.safetensors"), "dentropy: --policy: before: model.safetensors could"),
    "after": (
        "--after after --step-size 1e-3",
        1,
        cut("after/model.safetensors"),
        "dentropy: --after: after: model.safetensors c",
    ),
    "first": (MOVED, 0, cut("rollouts.jsonl"), "dentropy: rollouts.jsonl: line 11: broken"),
    "rollouts": (MOVED, 1, cut("rollouts.jsonl"), "dentropy: rollouts.jsonl: line 11: broken"),
    "direction": (MOVED, 1, another_direction, "dentropy: --direction: lm_head.weight has shape (2,), expected"),
    "no memory to load": (MOVED, 1, patched(Direction, "load", SHORT), "dentropy: CUDA out of memory. Tried to"),
    "no memory to check": (MOVED, 1, patched(Policy, "hidden", SHORT), "dentropy: --policy: a few tokens do not fit"),
    "no room": (MOVED, 0, patched(resumable, "UnfinishedRun", OSError("no room")), "dentropy: no room"),
    "a bug": (MOVED, 1, patched(measure, "response_stats", BUG), "dentropy: a bug, with its traceback there: KeyE"),
}
QUICK = ("direction",)


def run_rank(rank, port, folder, options, fails, harm):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    os.chdir(folder / str(rank))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
    with pytest.MonkeyPatch.context() as patch:
        if rank == fails:
            harm(patch)
        raise SystemExit(main(completed(f"probe {options} {OPTIONS.format(folder)}")))


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("fault", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_both_end_with_the_error_of_one(place, tmp_path, fault):
    options, fails, harm, said = FAULTS[fault]
    for rank in range(WORLD):
        shutil.copytree(place, tmp_path / str(rank))
    context, port = multiprocessing.get_context("fork"), free_port()
    arguments = (port, tmp_path, options, fails, harm)
    processes = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(WORLD)]
    start = time.monotonic()
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    took = time.monotonic() - start
    heard = [(tmp_path / f"{rank}.err").read_text() for rank in range(WORLD)]
    expected = [2, 2]
    if fault == "a bug":
        expected[fails] = 1
        assert heard[fails].rstrip().endswith("KeyError: 'a bug'")
        heard[fails] = ""
    assert [process.exitcode for process in processes] == expected, (took, heard)
    first, other = heard
    assert first.startswith(said) and first.count("\n") == 1, heard
    assert other == "" and first.endswith(f" (on rank {fails}, {socket.gethostname()})\n") == (fails != 0)
    assert not (tmp_path / "run").exists()
