"""How often the recorder's prediction and its measurement agree, over the steps of real GRPO runs of the demo's policy.

    python bench/trainer_coverage.py --processes 2 --out bench/results/statistics/trainer_coverage.json

A step counts as agreeing where prediction less measurement, both on the recorder's own rollouts, lies within its paired
95% interval. Measurements called unusable are counted apart. Beside it, whether the trainer's next rollouts, which
measure the step backwards, agree with the measurement: two independent samples.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from dentropy.demo import task
from dentropy.demo.run import POLICY, load_tokenizer
from dentropy.integrations.transformers import PREFIX, EntropyForecast

# Of the quadratic error's standard error: a curvature term below this part of it is left out.
SMALL_PART = 0.2
ROLLOUTS = {"n_prompts": 128, "per_prompt": 1}


class Agreement(EntropyForecast):
    """Keeps, of every step, what the log has no room for."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        step = self._step
        super().on_optimizer_step(args, state, control, **kwargs)
        self.rows = [*getattr(self, "rows", []), agreement(step)]


def agreement(step) -> dict:
    """Whether the paired interval of prediction less measurement holds 0: with the curvature, without, and by the rule
    that leaves a small curvature out."""
    small = abs(step.eta**2 / 2 * step.curvature.value) < SMALL_PART * step.quadratic_error.stderr
    row = {
        "quadratic": holds_zero(step.quadratic_error),
        "linear": holds_zero(step.error),
        "rule": holds_zero(step.error if small else step.quadratic_error),
    }
    return row | {"linear by the rule": bool(small), "verdict": step.diagnostics.verdict}


def holds_zero(estimate) -> bool:
    low, high = estimate.interval()
    return bool(low <= 0 <= high)


def run(seed: int, steps: int, lr: float, folder: str) -> list[dict]:
    """One training run."""
    torch.set_num_threads(1)
    arguments = GRPOConfig(
        output_dir=folder,
        seed=seed,
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=task.MAX_ANSWER + 1,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32),
        lambda prompts, completions, **_: [task.reward(p, c) for p, c in zip(prompts, completions, strict=True)],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": task.prompts(256, seed)}),
        processing_class=load_tokenizer(),
    )
    callback = Agreement.attach(trainer, every=1, report_every=0, seed=seed, **ROLLOUTS)
    trainer.train()
    back = {entry[f"{PREFIX}next_batch/step"]: entry for entry in trainer.state.log_history if is_judged(entry)}
    own = {entry["step"]: entry for entry in trainer.state.log_history if f"{PREFIX}measured_delta" in entry}
    for number, row in enumerate(callback.rows, 1):
        row["next_batch_z"] = z_of(own[number], back[number]) if number in back else None
    return callback.rows


def is_judged(entry: dict) -> bool:
    """Whether the entry has a usable measurement by the trainer's next rollouts."""
    key = f"{PREFIX}next_batch/"
    return f"{key}measured_delta_stderr" in entry and entry[f"{key}verdict"] > 0


def z_of(own: dict, back: dict) -> float:
    """The two measurements' difference in standard errors."""
    ends = [
        (entry[f"{PREFIX}{name}"], entry[f"{PREFIX}{name}_stderr"])
        for entry, name in ((own, "measured_delta"), (back, "next_batch/measured_delta"))
    ]
    (a, sa), (b, sb) = ends
    return (a - b) / float(np.hypot(sa, sb))


def summary(rows: list[dict]) -> dict:
    usable = [row for row in rows if row["verdict"] != "unusable"]
    z = np.array([row["next_batch_z"] for row in usable if row["next_batch_z"] is not None])
    shares = {name: float(np.mean([row[name] for row in usable])) for name in ("quadratic", "linear", "rule")}
    return {
        "steps": len(rows),
        "unusable": len(rows) - len(usable),
        "strained": sum(row["verdict"] == "strained" for row in rows),
        "within the paired 95% interval": shares,
        "linear by the rule": int(sum(row["linear by the rule"] for row in usable)),
        "next batch": {"steps": len(z), "within 2 standard errors": float(np.mean(np.abs(z) < 2)) if len(z) else None},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--steps", type=int, default=50, help="of a run")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    rows, start = [], time.time()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        folders = [str(Path(folder, str(seed))) for seed in range(options.seeds)]
        runs = pool.map(run, range(options.seeds), repeat(options.steps), repeat(options.lr), folders)
        for seeds, found in enumerate(runs, 1):
            rows += found
            content = summary(rows) | {"seeds": seeds, "learning_rate": options.lr, **ROLLOUTS}
            print(f"{time.time() - start:.0f} s: {json.dumps(content)}", flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
