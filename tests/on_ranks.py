"""What the ranks of a process group get, each in a process of its own."""

import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def on_ranks(target: Callable, world: int, directory: Path, *arguments) -> list:
    """Calls target(rank, *arguments) in `world` processes; of each what it left as {rank}.pickle in the directory."""
    # A forked process need not import everything again; one with a card cannot be forked.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    processes = [context.Process(target=target, args=(rank, *arguments)) for rank in range(world)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
    finally:
        for process in processes:
            process.kill()
    assert all(process.exitcode == 0 for process in processes)
    return [pickle.loads((directory / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def join(rank: int, world: int, directory: Path) -> None:
    """In such a process, the group of all of them, as a launcher describes it too; with one thread and no warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
