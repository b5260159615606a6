"""What the recorder costs: GRPO steps of the demo's policy with it, every step and every tenth, over those without.

    python bench/trainer_overhead.py --out bench/results/statistics/trainer_overhead.json

A step makes 64 rollouts, a record 128 of its own (its defaults). The three forms take turns, after a step with a record
that loads what is loaded once; times are CPU seconds of train(), on one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dentropy.examples import grpo
from dentropy.integrations.transformers import EntropyForecast

FORMS = {"without": None, "n = 10": 10, "n = 1": 1}


def seconds(every: int | None, steps: int, folder: str) -> float:
    """Of one run; with n = 10 the first step is recorded as well as every tenth."""
    trainer = grpo.trainer(folder, steps)
    if every is not None:
        EntropyForecast.attach(trainer, every, report_every=0)
    start = time.process_time()
    trainer.train()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        seconds(1, 1, folder)
        for _ in range(options.rounds):
            for name, every in FORMS.items():
                times[name].append(seconds(every, options.steps, folder))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["without"], strict=True)) for name in FORMS
    }
    found = {"steps": options.steps, "rounds": options.rounds, "CPU seconds": times, "times without": ratios}
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
