"""Runs cases of the benchmarks for `prove.py`, in a process of their own: what takes a GPU down takes no more with it.

    python bench/worker.py OUT '{"cases": [2, 3], "tiny": false, "left_out": {}}'

Appends a line of JSON to OUT as each case begins and as it ends, and ends itself where the GPU is lost.
"""

import gc
import importlib
import json
import sys
import time
from pathlib import Path

import interleaved
import torch
from machine import machine
from plan import STEPS, Case


class Recorder:
    """As much of pytest-benchmark's fixture as the benchmarks use."""

    group = None

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds: int) -> None:
        for _ in range(rounds):
            function()


def run(case: Case, tiny: bool) -> dict:
    """The case's extra_info, and what failed."""
    module, function = case.function.split(".")
    arguments = dict(case.tiny if tiny else case.full)
    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    recorder, found = Recorder(), {}
    try:
        call = getattr(importlib.import_module(module), function)
        gc.freeze()  # what is imported is not looked through at every measurement of memory
        call(recorder, **arguments)
    except interleaved.GPUIsLost as error:
        provider, why = found["lost"] = error.args
        found["failed"] = f"{provider} took the GPU down: {why}"
    except AssertionError as error:
        found["failed"] = str(error)
    except Exception as error:
        found["failed"] = interleaved.reason(error)
    return recorder.extra_info | found


def main(out: str, request: str) -> None:
    asked = json.loads(request)
    interleaved.LEFT_OUT.update(asked["left_out"])
    if asked["tiny"]:
        torch.set_num_threads(1)
        interleaved.ROUNDS, interleaved.SECONDS = 1, 0.0
    with Path(out).open("a", encoding="utf-8") as file:

        def say(**what):
            file.write(json.dumps(what) + "\n")
            file.flush()

        say(machine=machine())
        for index in asked["cases"]:
            say(begins=index)
            start = time.perf_counter()
            found = run(STEPS[index], asked["tiny"])
            say(ends=index, seconds=time.perf_counter() - start, **found)
            if "lost" in found:
                return
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
