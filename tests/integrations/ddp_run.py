"""A GRPO run of several processes, as torchrun starts it: `ddp_run.py FOLDER recorded|alone`; each says what it saw."""

import json
import sys
from pathlib import Path

import torch
from trainers import SMALL, fingerprint, sampling_trainer
from transformers import TrainerCallback

from dentropy.integrations.transformers import EntropyForecast

SETTINGS = dict(max_steps=3, ddp_backend="gloo")


class Kept(TrainerCallback):
    """The first step as the recorder saw it: what one process needs to measure it again."""

    def on_optimizer_step(self, args, state, control, *, model, **_):
        step = self.recorder._step
        if step is not None and not state.global_step:
            torch.save(
                dict(
                    weights={name: step._before[id(p)] for name, p in model.named_parameters()},
                    direction=step.direction.tensors,
                    batch=[[step.batch.prompt(i), step.batch.response(i)] for i in range(len(step.batch))],
                    group=step.batch.group.tolist(),
                    table={name: torch.from_numpy(x.copy()) for name, x in step.base.columns().items()},
                ),
                Path(args.output_dir, f"step-{args.process_index}.pt"),
            )


def main(folder: Path, recorded: bool) -> None:
    trainer = sampling_trainer("grpo", folder, settings=SETTINGS)
    if recorded:
        kept = Kept()
        kept.recorder = EntropyForecast.attach(trainer, 1, **SMALL | dict(report_every=2))
        trainer.callback_handler.callbacks.insert(0, kept)  # before the recorder lets go of its step
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    end = fingerprint(trainer.accelerator.unwrap_model(trainer.model), optimizer)
    rank = trainer.args.process_index
    torch.save({name: repr(value) for name, value in end.items()}, folder / f"end-{rank}.pt")
    numbers = [
        {name: value for name, value in entry.items() if name.startswith("dentropy/") or name == "step"}
        for entry in trainer.state.log_history
    ]
    (folder / f"log-{rank}.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "recorded")
