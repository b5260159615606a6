"""Keeping the rollouts that judge an update apart from those that made it."""

from __future__ import annotations

import warnings
from pathlib import Path

from dentropy.experiment.trl_names import CHECKPOINT, COMPLETIONS

SPLIT_SEED = 0
BIASED = "an update judged on the rollouts that made it is biased, often to the wrong sign"
WAY_OUT = (
    "rollouts drawn apart, or --split, which makes the update from half of the prompts and judges it on the others"
)


def check_files(options) -> None:
    """What file names tell, before anything is read; ValueError where one file is to make and to judge the update."""
    if options.split and options.update_rollouts is None:
        raise ValueError("--split: only with --update-rollouts, whose prompts it divides")
    if options.update_rollouts is not None and not options.split:
        files = Path(options.rollouts), Path(options.update_rollouts)
        if all(file.exists() for file in files) and files[0].samefile(files[1]):
            raise ValueError(f"--update-rollouts: {files[1]} is the file of --rollouts: {BIASED}; expected {WAY_OUT}")
    for name in ("rollouts", "update_rollouts"):
        _warn_of_trl_numbers(f"--{name.replace('_', '-')}", getattr(options, name), options.policy, options.after)


def apart(batch, update, divide: bool):
    """(rollouts to judge on, rollouts to make the update from, what was done in words or None).

    ValueError where they are mostly the same, a warning where some are."""
    from dentropy.rollouts.overlap import MOSTLY, overlap, split

    if divide:
        batch, update = split(batch, update, SPLIT_SEED)
        return batch, update, f"made from {update.n_groups} prompts, judged on {batch.n_groups} others"
    found = overlap(batch, update)
    what = f"--update-rollouts: {found.n_equal} of the {len(batch)} rollouts of --rollouts are among them"
    if found.share > MOSTLY:
        raise ValueError(f"{what}: {BIASED}; expected {WAY_OUT}")
    if found.share > 0:
        warnings.warn(f"{what}, more than chance gives: {BIASED}; expected {WAY_OUT}", stacklevel=2)
    return batch, update, None


def _warn_of_trl_numbers(option: str, rollouts: str | None, policy: str, after: str | None) -> None:
    """TRL counts a step before it saves: with its defaults completions_00003 is sampled by checkpoint-2 and makes the
    update to checkpoint-3."""
    log = COMPLETIONS.fullmatch(Path(rollouts or "").name)
    if log is None:
        return
    step, saved, moved = int(log[1]), _checkpoint(policy), _checkpoint(after)
    name = f"{option}: {log[0]}"
    if saved is not None and moved is not None and saved < step <= moved:
        warnings.warn(f"{name} made the update to checkpoint-{step}, with TRL's defaults: {BIASED}", stacklevel=3)
    elif saved is not None and saved != step - 1:
        warnings.warn(
            f"{name} is sampled by checkpoint-{step - 1}, with TRL's defaults, expected as --policy instead of "
            f"checkpoint-{saved}",
            stacklevel=3,
        )


def _checkpoint(folder: str | None) -> int | None:
    found = CHECKPOINT.fullmatch(Path(folder or "").name)
    return None if found is None else int(found[1])
