"""Which checkpoint sampled the rollouts that TRL logged.

TRL counts a step before it logs it, and one batch of rollouts may serve several steps. With E = steps_per_generation ·
num_iterations and G = gradient_accumulation_steps, it generates at every microbatch whose number is a multiple of E and
steps after every G microbatches, so that at the end of step s the last batch is that of microbatch

    m = ⌊(s G − 1) / E⌋ E ,   sampled by the policy after ⌊m / G⌋ steps .

None of this is in a folder that may be read without running code. But a log that differs from the one a step before was
sampled in between: by the checkpoint a step before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Schedule:
    """TRL's arguments of these names; `accumulation` is gradient_accumulation_steps.

    Raises:
        ValueError: for counts below 1.

    Example:
        >>> [Schedule(4, 2, 2).sampler(step) for step in (1, 4, 5, 8, 9)]
        [0, 0, 4, 4, 8]
    """

    steps_per_generation: int = 1
    num_iterations: int = 1
    accumulation: int = 1

    def __post_init__(self):
        for name, count in vars(self).items():
            if count < 1:
                raise ValueError(f"{name}: {count}, expected at least 1")

    def sampler(self, step: int) -> int:
        """The number of steps after which the policy sampled what the log of `step` holds."""
        every = self.steps_per_generation * self.num_iterations
        return ((step * self.accumulation - 1) // every * every) // self.accumulation


def sampled_log(
    checkpoint: int,
    logs: Mapping[int, Path],
    rows: Callable[[Path], list],
    schedule: Schedule | None = None,
    mixed: Collection[int] = (),
) -> int | None:
    """The step whose log the checkpoint after `checkpoint` steps sampled; None where there is none.

    Args:
        checkpoint: its number of steps.
        logs: files by step, in order.
        rows: what is in a file, to compare.
        schedule: the trainer's, where it is known.
        mixed: steps whose logs hold other rollouts too.

    Raises:
        ValueError: where the logs do not tell and there is no schedule, or where they say otherwise than it.
    """
    later = [step for step in logs if step > checkpoint]
    if schedule is not None:
        later = [step for step in later if schedule.sampler(step) == checkpoint]
    step = later[0] if schedule is not None and later else checkpoint + 1
    if not later or step in mixed:
        return None
    seen = _by_content(step, logs, rows, mixed) if step in logs else None
    if seen is None and schedule is None:
        raise ValueError(
            f"{logs[later[0]]}: which checkpoint sampled it is not known, as logs of the steps before are not there, "
            "expected TRL's arguments (--gradient-accumulation-steps, --steps-per-generation, --num-iterations), or "
            "--fresh, which draws rollouts anew"
        )
    if seen is not None and schedule is not None and seen != checkpoint:
        raise ValueError(
            f"{logs[step]}: sampled by checkpoint {seen}, as logs of consecutive steps tell, and by checkpoint "
            f"{checkpoint} by the schedule ({schedule}), expected that of the run"
        )
    return step if seen in (None, checkpoint) else None


def _by_content(
    step: int, logs: Mapping[int, Path], rows: Callable[[Path], list], mixed: Collection[int]
) -> int | None:
    """Who sampled the log of `step`: the checkpoint a step before the first log that holds the same batch."""
    while step > 1:
        if step - 1 not in logs:
            return None
        if rows(logs[step - 1]) != rows(logs[step]):
            return step - 1
        step -= 1
        if step in mixed:
            return None
    return 0
