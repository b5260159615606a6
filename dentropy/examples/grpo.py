"""TRL's GRPO trainer with the recorder, on the demo's policy and task: predicted beside measured, step by step.

    pip install "dentropy[trl]"
    python -m dentropy.examples.grpo --out grpo.png

It takes less than two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dentropy.demo import task
from dentropy.demo.run import POLICY, load_tokenizer
from dentropy.integrations.transformers import EntropyForecast

STEPS, EVERY, LEARNING_RATE = 40, 3, 1e-4


def reward(prompts: list[str], completions: list[str], **_) -> list[float]:
    """1 for an expression of the prompt's value."""
    return [task.reward(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def trainer(folder: str | Path, steps: int = STEPS, seed: int = 0, **settings):
    """TRL's GRPOTrainer for the task, 64 rollouts a step; `settings` of GRPOConfig beside those here or instead."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments = dict(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=task.MAX_ANSWER + 1,
        seed=seed,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32),
        reward,
        args=GRPOConfig(**arguments | settings),
        train_dataset=Dataset.from_dict({"prompt": task.prompts(512, seed)}),
        processing_class=load_tokenizer(),
    )


def train(folder: str | Path, steps: int = STEPS) -> list[dict]:
    """Trains for some steps; the recorder's entries of the log."""
    grpo = trainer(folder, steps)
    EntropyForecast.attach(grpo, EVERY, n_prompts=128, per_prompt=2, report_every=0)
    grpo.train()
    return [entry for entry in grpo.state.log_history if "dentropy/measured_delta" in entry]


def plot(entries: list[dict], path: str | Path) -> None:
    """Predicted and measured ΔH of each recorded step, and the entropy, with 95% error bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = [entry["step"] for entry in entries]
    for name, shift, color in (("predicted", -0.15, "#0072B2"), ("measured", 0.15, "#000000")):
        values = [1e3 * entry[f"dentropy/{name}_delta"] for entry in entries]
        bars = [2e3 * entry.get(f"dentropy/{name}_delta_stderr", 0.0) for entry in entries]
        at = [step + shift for step in steps]
        top.errorbar(at, values, bars, fmt="o", ms=4, lw=1, capsize=2, color=color, label=name)
    top.axhline(0, color="0.8", lw=0.8, zorder=0)
    top.set_ylabel("ΔH of one step\n(10⁻³ nats per token)")
    top.legend(frameon=False)
    bottom.plot(steps, [entry["dentropy/entropy"] for entry in entries], "o-", color="#009E73", ms=4)
    bottom.set_ylabel("entropy\n(nats per token)")
    bottom.set_xlabel("optimizer step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("grpo.png"), help="the plot to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        entries = train(folder, options.steps)
    plot(entries, options.out)
    print(f"{len(entries)} of {options.steps} steps recorded, in {options.out}")


if __name__ == "__main__":
    main()
