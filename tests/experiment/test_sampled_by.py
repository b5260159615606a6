"""Which checkpoint sampled a log, against TRL's loop played through."""

import itertools
from pathlib import Path

import pytest

from dentropy.experiment.sampled_by import Schedule, sampled_log

STEPS = 12


def played(generation, iterations, accumulation):
    """{step: (steps done when its log's batch was sampled, the batch's number)}, microbatch by microbatch."""
    logged, microbatch, steps, batch = {}, 0, 0, None
    while steps < STEPS:
        for _ in range(accumulation):
            if microbatch % (generation * iterations) == 0:
                batch = (steps, microbatch)
            microbatch += 1
        steps += 1
        logged[steps] = batch
    return logged


@pytest.mark.parametrize("schedule", list(itertools.product((1, 2, 3, 6), (1, 2), (1, 2, 3, 4))))
def test_the_formula_and_the_logs_say_what_the_loop_did(schedule):
    truth = played(*schedule)
    logs = {step: Path(str(step)) for step in truth}
    rows = lambda path: [truth[int(path.name)]]  # noqa: E731
    for step, (sampler, _) in truth.items():
        assert Schedule(*schedule).sampler(step) == sampler
    sampled = {sampler for sampler, _ in truth.values()}
    for checkpoint in range(STEPS):
        by_logs = sampled_log(checkpoint, logs, rows)
        assert by_logs == sampled_log(checkpoint, logs, rows, Schedule(*schedule))
        assert by_logs == (checkpoint + 1 if checkpoint in sampled else None)
    assert sampled_log(STEPS, logs, rows) is None


def test_what_logs_do_not_tell_is_asked_for():
    logs = {step: Path(f"completions_{step:05d}") for step in (10, 20)}
    with pytest.raises(ValueError, match=r"^completions_00020: which checkpoint .* not known.*--num-iterations"):
        sampled_log(10, logs, lambda path: [path.name])
    assert sampled_log(10, logs, lambda path: [path.name], Schedule()) is None
    assert sampled_log(19, logs, lambda path: [path.name], Schedule()) == 20
    assert sampled_log(10, logs, lambda path: [path.name], Schedule(num_iterations=10)) == 20


def test_logs_that_belie_the_schedule_are_refused():
    logs = {step: Path(str(step)) for step in (1, 2)}
    with pytest.raises(ValueError, match=r"2: sampled by checkpoint 0, as logs .* by checkpoint 1"):
        sampled_log(1, logs, lambda path: ["the same"], Schedule())


def test_a_log_that_an_evaluation_wrote_over_tells_nothing():
    logs = {step: Path(str(step)) for step in (1, 2, 3)}
    assert sampled_log(1, logs, lambda path: [path.name], mixed={2}) is None
    assert sampled_log(2, logs, lambda path: [path.name], mixed={2}) == 3
    with pytest.raises(ValueError, match="not known"):
        sampled_log(2, logs, lambda path: ["the same"], mixed={2})


@pytest.mark.parametrize("name", ["steps_per_generation", "num_iterations", "accumulation"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: 0, expected at least 1"):
        Schedule(**{name: 0})
