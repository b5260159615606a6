"""Who judges a step: rollouts that did not make it."""

from __future__ import annotations

from dataclasses import dataclass

from dentropy.experiment.recorded_run import Checkpoint, RecordedRun, Rollouts

AFTER, HELD_OUT, FRESH = "next rollouts", "held-out rollouts", "fresh rollouts"


@dataclass(frozen=True)
class Judged:
    """One step and who judges it.

    Attributes:
        before, after: the checkpoints.
        by: AFTER, rollouts that `after` sampled, or that are reweighted to it; HELD_OUT, those that `before` sampled
            and that made no update; FRESH, some drawn from `after` now.
        rollouts: their file; of FRESH, the one whose prompts they answer.
    """

    before: Checkpoint
    after: Checkpoint
    by: str
    rollouts: Rollouts

    @property
    def backward(self) -> bool:
        return self.by != HELD_OUT

    @property
    def base(self) -> Checkpoint:
        """Whose rollouts judge."""
        return self.after if self.backward else self.before

    @property
    def name(self) -> str:
        return f"{self.before.step:06d}-{self.after.step:06d}"


def judged_steps(run: RecordedRun) -> list[Judged]:
    """Each step of the run, from one checkpoint to the next, with its judges.

    Raises:
        ValueError: where no rollouts of the run tell the prompts for fresh ones.
    """
    found = []
    for before, after in zip(run.checkpoints, run.checkpoints[1:]):
        if after.rollouts is not None:
            found.append(Judged(before, after, AFTER, after.rollouts))
        elif before.rollouts is not None and not before.rollouts.made_update:
            found.append(Judged(before, after, HELD_OUT, before.rollouts))
        else:
            found.append(Judged(before, after, FRESH, _prompts(run, before)))
    return found


def judge_of(row: dict) -> str:
    """Who judged a step of the timeline, for a reader.

    Example:
        >>> judge_of({"judged_by": AFTER, "base_weights_ess_fraction": 0.913})
        'next rollouts, reweighted to an ESS of 91.3%'
    """
    share = row.get("base_weights_ess_fraction")
    return row["judged_by"] + ("" if share is None else f", reweighted to an ESS of {share:.1%}")


def _prompts(run: RecordedRun, before: Checkpoint) -> Rollouts:
    """Rollouts whose prompts fresh ones answer: the last that were made before the step, where there are some."""
    known = [(c.step, c.rollouts) for c in run.checkpoints if c.rollouts is not None]
    known += [(-1 if each.step is None else each.step - 1, each) for each in run.others]
    if not known:
        raise ValueError(f"run: {run.kind}: no rollouts, expected some, for their prompts at least")
    earlier = [entry for entry in known if entry[0] < before.step]
    return max(earlier or known, key=lambda entry: entry[0])[1]
