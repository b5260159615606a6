"""A training run replayed: what each step from one checkpoint to the next did to the entropy.

Rollouts that made a step must not judge it, and what a trainer samples before a step is what it makes the step from. So
a step from a to b is judged by rollouts that b sampled, for its own next step: the slope is taken at b along θ_b − θ_a,
and weights lead back from b to a, at η = −1 in the units of the step (minus the learning rate, where that is known).
What is found there has the other sign:

    ΔH = H(b) − H(a) = −(R(−1) − R(0)) ,   predicted R'(0), or R'(0) − R''(0)/2 .
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dentropy.doors import json_value, third_party
from dentropy.estimators.groups import Groups
from dentropy.experiment.entries import writable
from dentropy.experiment.judges import FRESH, Judged, judged_steps
from dentropy.experiment.probe import entropy_per_token, probe, tokens_to_run
from dentropy.experiment.progress import token_bar
from dentropy.experiment.recorded_run import Checkpoint, RecordedRun, Rollouts
from dentropy.experiment.run_folder import ViewsFailedError
from dentropy.experiment.timeline import logged, pair_row, pair_text, still_row, write_timeline
from dentropy.experiment.unfinished import remove_left_behind, temporary
from dentropy.model.difference import difference
from dentropy.model.direction import Direction
from dentropy.model.policy import Policy
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.optimizer_state import load_state, state_file
from dentropy.passes.policy_gradient import PolicyGradientStep, policy_gradient_step
from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.reading import read_rollouts
from dentropy.rollouts.sampling import end_tokens, sample

PAIRS, PAIR, PROBE = "pairs", "pair.json", "probe"


def _nothing(text: str) -> None:
    pass


@dataclass(frozen=True)
class Settings:
    """How a run is replayed.

    Attributes:
        tokenizer: for rollouts given as text, and for pages.
        loading: arguments of `Policy.from_pretrained`.
        reading: arguments of `read_rollouts`; its max_new_tokens is where fresh rollouts are cut off too.
        prompts, token_budget, parameters: as in `probe`.
        update: arguments of `policy_gradient_step`, to explain single optimizer steps by their own rollouts; None: do
            not.
        seed: of fresh rollouts, to which the step is added.
    """

    tokenizer: object = None
    loading: dict = field(default_factory=dict)
    reading: dict = field(default_factory=dict)
    prompts: str = "random"
    token_budget: int | str = AUTO
    parameters: bool = True
    update: dict | None = None
    seed: int = 0

    def policy(self, checkpoint: Checkpoint) -> Policy:
        return Policy.from_pretrained(checkpoint.path, **self.loading)

    def read(self, rollouts: Rollouts, policy: Policy) -> PackedBatch:
        ends = end_tokens(policy) or None
        return read_rollouts(rollouts.path, self.tokenizer, end_tokens=ends, step=rollouts.step, **self.reading)

    def drawn(self, policy: Policy, like: PackedBatch, seed: int) -> PackedBatch:
        """Rollouts of the policy to the prompts of others, as many for each."""
        temperature = np.unique(like.temperatures)
        if temperature.size > 1:
            raise ValueError(f"temperature: {temperature.size} different ones, expected one to draw fresh rollouts at")
        first = np.unique(like.group, return_index=True)[1].tolist()
        ends = end_tokens(policy) or (() if self.tokenizer is None else (self.tokenizer.eos_token_id,))
        return sample(
            policy,
            [like.prompt(i) for i in first],
            per_prompt=max(1, round(len(like) / len(first))),
            max_new_tokens=self.reading["max_new_tokens"],
            temperature=float(temperature[0]),
            seed=seed,
            eos_token_id=ends,
        )

    def words(self) -> dict:
        """What they are, to tell one replay from another."""
        found = {name: value for name, value in vars(self).items() if name != "tokenizer"}
        return json.loads(json.dumps(found, default=str))


def replay(run: RecordedRun, out: str | Path, settings: Settings, say: Callable[[str], None] = _nothing) -> dict:
    """Judges every step of a run and writes the folder `out`: a run folder for each, the timeline, a page.

    A step that is in `out` already, from the same files and settings, is kept and not done again.

    Args:
        run: what `recorded_run` found.
        out: a new or an empty folder, or that of a replay of this run.
        settings: how.
        say: called with each finished step, in words.

    Returns:
        The content of replay.json, as results.md describes it.

    Raises:
        ValueError: before any work, for an `out` of something else, without rollouts or what fresh ones need; and as
            `Policy`, `Direction.between`, `read_rollouts` and `probe` do.
    """
    steps = judged_steps(run)
    fresh = [step.name for step in steps if step.by == FRESH]
    if fresh and settings.reading.get("max_new_tokens") is None:
        raise ValueError(f"max_new_tokens: not given, expected it for step {fresh[0]}, judged by rollouts drawn anew")
    out = _opened(Path(out))
    rows = []
    for step in steps:
        folder, inputs = out / PAIRS / step.name, _fingerprint(step, settings)
        row = _kept(folder, inputs)
        if row is None:
            row = _judge(step, folder, inputs, settings, first=step is steps[0])
        rows.append(row | logged(step))
        say(pair_text(row))
    return write_timeline(out, run, rows)


def _judge(step: Judged, folder: Path, inputs: dict, settings: Settings, first: bool) -> dict:
    """Probes one step and saves it; its row of the timeline."""
    own = {}
    if first and step.backward and step.before.rollouts is not None:
        own = _own_entropy(settings.policy(step.before), step.before.rollouts, settings)
    differs = difference(step.before.path, step.after.path, settings.loading.get("trust_remote_code", False))
    if not differs:
        row = still_row(step) | own
        _save(folder, {"inputs": inputs, "row": row})
        return row
    policy, seed = settings.policy(step.base), settings.seed + step.after.step
    batch = settings.read(step.rollouts, policy)
    if step.by == FRESH:
        batch = settings.drawn(policy, batch, seed)
    update = _own_update(step, settings)
    step_size = 1.0 if update is None else update.step_size
    direction = Direction({name: x / step_size for name, x in differs.items()}, step_size)
    etas = [-step_size if step.backward else step_size]
    with token_bar(f"step {step.name}", tokens_to_run(policy, batch, etas, settings.parameters, update)) as progress:
        result = probe(
            policy,
            batch,
            direction,
            etas,
            token_budget=settings.token_budget,
            prompts=settings.prompts,
            parameters=settings.parameters,
            update=update,
            progress=progress,
        )
    row = pair_row(result, step) | own
    result = replace(result, **_said_of(step, seed))
    _save(folder, {"inputs": inputs, "row": row}, lambda path: result.save(path, settings.tokenizer))
    return row


def _own_update(step: Judged, settings: Settings) -> PolicyGradientStep | None:
    """The optimizer's step, made anew from the rollouts that made it; None where it was not asked for, for several
    steps, and where these rollouts or the optimizer's state before them are not there."""
    rollouts, state = step.before.rollouts, state_file(step.before.path)
    alone = step.after.step == step.before.step + 1 and rollouts is not None and rollouts.made_update
    if settings.update is None or not alone or not state.is_file():
        return None
    policy = settings.policy(step.before)
    content = load_state(state)
    with third_party(f"{state}: no learning rate", "an optimizer's state_dict()"):
        step_size = max(float(group["lr"]) for group in content["param_groups"])
    return policy_gradient_step(
        policy,
        settings.read(rollouts, policy),
        step_size=step_size,
        optimizer_state=content,
        token_budget=settings.token_budget,
        **settings.update,
    )


def _own_entropy(policy: Policy, rollouts: Rollouts, settings: Settings) -> dict:
    """H̄ of the first checkpoint by its own rollouts: they say nothing of the step that they made, but this they do."""
    sums = measure(policy, settings.read(rollouts, policy), keep_tokens=True, token_budget=settings.token_budget)
    value, influence = entropy_per_token(sums)
    stderr, _ = Groups.of(sums.group, settings.prompts).stderr(influence)
    return {"own_entropy_before": value, "own_entropy_before_stderr": stderr}


def _said_of(step: Judged, seed: int) -> dict:
    """Where its numbers come from, for the run folder."""
    source = {"policy": step.base.path, "before": step.before.path, "after": step.after.path, "judged by": step.by}
    source |= {"prompts of" if step.by == FRESH else "rollouts": step.rollouts.path}
    if step.backward:
        source |= {"direction": "backwards: at minus the step size is the checkpoint before"}
    seeds = {"fresh_rollouts": seed} if step.by == FRESH else {}
    return {"source": {name: str(value) for name, value in source.items()}, "seeds": seeds}


def _opened(out: Path) -> Path:
    """`out` with its folder of steps; ValueError where it is something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} exists and is not a folder, expected a new or an empty one, or a replay's")
    if out.is_dir() and any(out.iterdir()) and not (out / PAIRS).is_dir():
        raise ValueError(f"out: {out} exists and is no replay's, expected a new or an empty folder, or a replay's")
    try:
        (out / PAIRS).mkdir(parents=True, exist_ok=True)
        remove_left_behind(out / PAIRS)
    except OSError as error:
        raise ValueError(f"out: {out} cannot be written, expected a folder that can ({error})") from error
    return out


def _save(folder: Path, content: dict, probed: Callable[[Path], object] = Path.mkdir) -> None:
    """The folder of a step, by one rename at the end. A report or figure that fails is warned of, and left out."""
    unfinished = temporary(folder.parent)
    try:
        unfinished.mkdir()
        try:
            probed(unfinished / PROBE)
        except ViewsFailedError as error:
            warnings.warn(str(error), stacklevel=2)
        text = json.dumps(writable(content), indent=2, allow_nan=False)
        (unfinished / PAIR).write_text(text + "\n", encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _kept(folder: Path, inputs: dict) -> dict | None:
    """The row of a step that is there; None where it is not. ValueError where it was made of other inputs."""
    path = folder / PAIR
    if not path.is_file():
        return None
    content = json_value(path.read_bytes(), str(path))
    if not isinstance(content, dict) or not isinstance(content.get("row"), dict):
        raise ValueError(f"{path}: not a step of a replay, expected its inputs and row")
    found = content.get("inputs")
    other = [name for name in inputs if not isinstance(found, dict) or found.get(name) != inputs[name]]
    if set(other) <= {"judge", "rollouts"} and content["row"].get("judged_by") == FRESH:
        other = []  # the run went on since, and its own rollouts are there now: those drawn anew still stand
    if other:
        raise ValueError(
            f"out: {folder} was made with another {', '.join(other)}, expected the same as now, or another folder"
        )
    return content["row"]


def _fingerprint(step: Judged, settings: Settings) -> dict:
    """What a step is made of: files by name, size and time, and settings."""
    files = {"before": step.before.path, "after": step.after.path, "rollouts": step.rollouts.path}
    return {name: _stamp(path) for name, path in files.items()} | {"judge": step.by, "settings": settings.words()}


def _stamp(path: Path) -> str:
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in found if f.is_file()]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
