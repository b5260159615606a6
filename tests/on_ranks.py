"""What the ranks of a process group get, each in a process of its own."""

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import torch


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
