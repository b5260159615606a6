"""A GRPO run of TRL on the demo's policy and task, left on disk as TRL leaves it, for `dentropy replay`.

    pip install "dentropy[trl]"
    python -m dentropy.examples.grpo_run --out RUN
    dentropy replay RUN --temperature 1 --append-eos --max-new-tokens 33 --out REPLAY

The first takes about two minutes on one CPU core, the second three. TRL does not save the policy that it starts from:
that is checkpoint-0.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from dentropy.demo.run import POLICY
from dentropy.examples.grpo import trainer

STEPS = 16
# All that a replay needs, of every step; and enough rollouts to see what one step does.
KEPT = dict(save_strategy="steps", save_steps=1, logging_steps=1, log_completions=True, num_completions_to_print=0)
ROLLOUTS = 512


def train(folder: str | Path, steps: int = STEPS, rollouts: int = ROLLOUTS) -> Path:
    """Trains for some steps of so many rollouts; the folder, with a checkpoint and a log of completions for each."""
    shutil.copytree(POLICY, Path(folder, "checkpoint-0"))
    trainer(folder, steps, per_device_train_batch_size=rollouts, **KEPT).train()
    return Path(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the run's folder, a new one")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{options.steps} steps in {train(options.out, options.steps)}")


if __name__ == "__main__":
    main()
