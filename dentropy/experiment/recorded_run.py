"""What a training run left on disk: its checkpoints in order, and who sampled which rollouts.

A run is a folder of TRL (checkpoint-N beside completions/), of verl (global_step_N, with its dumps elsewhere) or of
prime-rl (weights/step_N beside token_exports/), or a list of checkpoints in a TOML or JSON file.
"""

from __future__ import annotations

import math
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dentropy.doors import json_value, regular_file, third_party
from dentropy.experiment.sampled_by import Schedule, sampled_log
from dentropy.experiment.trl_names import CHECKPOINT, COMPLETIONS
from dentropy.model.adapters import base_it_began_at
from dentropy.rollouts.files import rows_in

LAST_STEP = 10**15  # far beyond any run
LARGEST = sys.float_info.max
LIST_KEYS = {"path": str, "step": int, "rollouts": str, "made_update": bool, "entropy": (int, float)}


@dataclass(frozen=True)
class Rollouts:
    """A file of rollouts: `step` chooses those of one step where it has several; `made_update` is False for rollouts
    that were kept out of training."""

    path: Path
    step: int | None = None
    made_update: bool = True


@dataclass(frozen=True)
class Checkpoint:
    """The policy after `step` steps; `rollouts` it sampled, and what the trainer itself logged of its entropy."""

    step: int
    path: Path
    rollouts: Rollouts | None = None
    logged_entropy: float | None = None


@dataclass(frozen=True)
class RecordedRun:
    """At least two checkpoints, by step.

    Attributes:
        kind: as the user is told.
        checkpoints: in order.
        others: more rollouts, for their prompts; `step` is that of the update they made.
        notes: what was left out, in words.
    """

    kind: str
    checkpoints: tuple[Checkpoint, ...]
    others: tuple[Rollouts, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        steps = [checkpoint.step for checkpoint in self.checkpoints]
        if len(steps) < 2:
            raise ValueError(f"run: {len(steps)} checkpoint in {self.kind}, expected at least 2")
        if steps != sorted(set(steps)):
            raise ValueError(f"run: steps {steps} in {self.kind}, expected increasing ones")


def recorded_run(
    path: str | Path,
    *,
    rollouts: str | Path | None = None,
    schedule: Schedule | None = None,
    lag: int | None = None,
    fresh: bool = False,
) -> RecordedRun:
    """The run in a folder or a list.

    Args:
        path: a trainer's output folder, or a file with a list `checkpoints` of `path` and `step`, and where there are
            some `rollouts` (sampled by it), `made_update` (false where these are of no update) and `entropy` (as
            logged).
        rollouts: of verl, its rollout_data_dir.
        schedule: TRL's, where logs do not tell which checkpoint sampled them.
        lag: of prime-rl, by how many steps the policy that samples is behind: what was exported at step N was sampled
            by the weights of step N − lag. None: a checkpoint gets the first export after its step, which made none of
            the steps to it; what the sampler gave its tokens is in there, to weigh them with.
        fresh: do without: no log judges a step.

    Raises:
        ValueError: for what is none of these, fewer than two checkpoints, and logs of which it cannot be known who
            sampled them.
    """
    path = Path(path)
    if path.is_file():
        return _listed(path)
    if not path.is_dir():
        raise ValueError(f"run: {path}: no such folder or file, expected a run's folder or a list of checkpoints")
    if found := _numbered(path, CHECKPOINT):
        return _trl(path, found, schedule, fresh)
    if found := _numbered(path, r"global_step_(\d+)"):
        return _verl(path, found, rollouts, fresh)
    if found := _numbered(path / "weights", r"step_(\d+)"):
        return _prime_rl(path, found, lag, fresh)
    raise ValueError(
        f"run: {path}: no checkpoint-*, global_step_* or weights/step_* in it, expected the output folder of TRL, verl "
        "or prime-rl, or a TOML or JSON file that lists checkpoints"
    )


def _trl(folder: Path, checkpoints: dict[int, Path], schedule: Schedule | None, fresh: bool) -> RecordedRun:
    logs = _numbered(folder / "completions", COMPLETIONS)
    history = _log_history(checkpoints[max(checkpoints)])
    evaluated = {entry["step"] for entry in history if any(name.startswith("eval_") for name in entry)} & set(logs)
    base = _common_base(checkpoints)
    if base is not None:
        checkpoints = {0: base} | checkpoints
    by = {} if fresh else {step: sampled_log(step, logs, _answers(), schedule, evaluated) for step in checkpoints}
    entropy = _of_single_steps(history, "entropy")
    notes = [f"completions of step {step} left out: an evaluation wrote over them" for step in sorted(evaluated)]
    if base is not None:
        notes.append(f"checkpoint 0 is {base}, the base model of the adapters: training is taken to have begun there")

    def rollouts(step: int) -> Rollouts | None:
        log = by.get(step)
        return None if log is None else Rollouts(logs[log], log)

    return RecordedRun(
        f"{folder}, a run of TRL",
        tuple(Checkpoint(step, place, rollouts(step), entropy.get(step + 1)) for step, place in checkpoints.items()),
        tuple(Rollouts(log, step) for step, log in logs.items() if step not in evaluated),
        tuple(notes),
    )


def _common_base(checkpoints: dict[int, Path]) -> Path | None:
    """The base model of checkpoints that are adapters alone; None where one is not, or is what training began at."""
    bases = {base_it_began_at(place, "run") for place in checkpoints.values()}
    return None if 0 in checkpoints or len(bases) > 1 or None in bases else Path(bases.pop())


def _verl(folder: Path, checkpoints: dict[int, Path], rollouts: str | Path | None, fresh: bool) -> RecordedRun:
    """It counts a step when it begins: the dump of step s was sampled by the policy after s − 1, and makes step s."""
    if rollouts is None:
        raise ValueError(f"rollouts: not given, expected the rollout_data_dir of {folder}, a run of verl (--rollouts)")
    dumps = _numbered(Path(rollouts), r"(\d+)\.jsonl")
    places = {step: place / "actor" if (place / "actor").is_dir() else place for step, place in checkpoints.items()}
    return _of_dumps(f"{folder}, a run of verl", places, dumps, {step: step + 1 for step in places}, fresh)


def _prime_rl(folder: Path, checkpoints: dict[int, Path], lag: int | None, fresh: bool) -> RecordedRun:
    """It samples while it trains, by weights that are some steps old, and exports what they gave the tokens."""
    if lag is not None and lag < 0:
        raise ValueError(f"lag: {lag}, expected at least 0: rollouts are sampled before they make a step")
    exports = _numbered(folder / "token_exports", r"step_(\d+)")
    if lag is None:
        ends = [*list(checkpoints)[1:], math.inf]  # so that no two checkpoints get the same
        by = {
            step: next((export for export in exports if step < export <= end), None)
            for step, end in zip(checkpoints, ends, strict=True)
        }
    else:
        by = {step: step + lag for step in checkpoints}
    return _of_dumps(f"{folder}, a run of prime-rl", checkpoints, exports, by, fresh)


def _of_dumps(
    kind: str, checkpoints: dict[int, Path], dumps: dict[int, Path], by: dict[int, int | None], fresh: bool
) -> RecordedRun:
    """A run whose dump of step `by[s]`, where there is one, judges as the checkpoint after s steps."""

    def rollouts(step: int) -> Rollouts | None:
        return None if fresh or by[step] not in dumps else Rollouts(dumps[by[step]], None)

    others = tuple(Rollouts(dump, step) for step, dump in dumps.items())
    return RecordedRun(
        kind, tuple(Checkpoint(step, place, rollouts(step)) for step, place in checkpoints.items()), others
    )


def _answers() -> Callable[[Path], list]:
    """Reads what is compared of a log, keeping the last two."""
    return lru_cache(2)(lambda path: [(row.get("prompt"), row.get("completion")) for _, row in rows_in(path)])


def _log_history(checkpoint: Path) -> list[dict]:
    """trainer_state.json's, where there is one."""
    path = checkpoint / "trainer_state.json"
    if not path.is_file():
        return []
    state = json_value(path.read_bytes(), str(path))
    history = state.get("log_history") if isinstance(state, dict) else None
    entries = history if isinstance(history, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and type(entry.get("step")) is int]


def _of_single_steps(history: list[dict], name: str) -> dict[int, float]:
    """{step: value} of the entries that are about one step alone; others are means over several."""
    found = {entry["step"]: entry[name] for entry in history if isinstance(entry.get(name), float)}
    return {step: value for step, value in found.items() if step == 1 or step - 1 in found}


def _listed(path: Path) -> RecordedRun:
    regular_file(path, "a list of checkpoints", "run")
    if path.suffix == ".toml":
        with third_party(f"run: {path}: cannot be read", "a TOML file"):
            content = tomllib.loads(path.read_text(encoding="utf-8"))
    else:
        content = json_value(path.read_bytes(), f"run: {path}", "a TOML or JSON file")
    entries = content.get("checkpoints") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"run: {path}: no list `checkpoints`, expected one of path and step")
    if beside := [name for name in content if name != "checkpoints"]:
        raise ValueError(f"run: {path}: {beside[0]!r:.40} is unknown, expected `checkpoints` alone")
    return RecordedRun(
        str(path), tuple(_entry(f"run: {path}: checkpoint {i + 1}", e, path) for i, e in enumerate(entries))
    )


def _entry(where: str, entry: object, path: Path) -> Checkpoint:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {type(entry).__name__}, expected path and step")
    for name, value in entry.items():
        if name not in LIST_KEYS:
            raise ValueError(f"{where}: {name!r:.40} is unknown, expected {', '.join(LIST_KEYS)}")
        if not isinstance(value, LIST_KEYS[name]) or (isinstance(value, bool) and name != "made_update"):
            raise ValueError(f"{where}: {name}: {value!r:.40}, expected another kind of value")
    for name in ("path", "step"):
        if name not in entry:
            raise ValueError(f"{where}: no {name}, expected path and step")
    if not 0 <= entry["step"] <= LAST_STEP:
        raise ValueError(f"{where}: step: {entry['step']!r:.40}, expected a number of optimizer steps")
    if not abs(entry.get("entropy", 0)) <= LARGEST:  # nor NaN
        raise ValueError(f"{where}: entropy: {entry['entropy']!r:.40}, expected a finite number")
    rollouts = entry.get("rollouts")
    made = entry.get("made_update", True)
    return Checkpoint(
        entry["step"],
        path.parent / entry["path"],
        None if rollouts is None else Rollouts(path.parent / rollouts, None, made),
        entry.get("entropy"),
    )


def _numbered(folder: Path, pattern: str | re.Pattern) -> dict[int, Path]:
    """What in a folder has a name of the pattern, by its number, in order."""
    if not folder.is_dir():
        return {}
    found = {int(m[1]): place for place in folder.iterdir() if (m := re.fullmatch(pattern, place.name))}
    return dict(sorted(found.items()))
