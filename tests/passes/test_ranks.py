"""Passes dealt over processes: what two CPU ranks get against what this process gets alone.

All cases run in one set of processes; the tests look at what each rank got.
"""

import dataclasses
import pickle
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import random_batch, random_direction, random_model
from on_ranks import on_ranks

from dentropy import Direction, Policy, mean_discriminant, measure, policy_gradient_step, probe
from dentropy.passes import ranks
from dentropy.passes.microbatches import TokenBudget, walk
from dentropy.passes.reverse_mode import gradient

BUDGET = 40
STEP = 1e-3
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Case:
    """A policy, rollouts and a direction, the same in every process."""

    def __init__(self, dtype):
        self.model = random_model("llama", 0).to(DTYPES[dtype])
        self.policy = Policy(self.model)
        batch = random_batch(rollouts=24)
        temperatures = np.where(np.arange(24) < 9, 0.7, 1.0)
        rng = np.random.default_rng(0)
        self.batch = dataclasses.replace(
            batch, reward=rng.random(24), group=np.arange(24) // 4, temperature=temperatures
        )
        self.direction = Direction(random_direction(self.model).tensors, STEP)


def limited(policy, limit):
    """Makes the policy run out of memory above so many tokens."""
    hidden = policy.hidden

    def running(row):
        if len(row.tokens) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return hidden(row)

    policy.hidden = running


def tables_of(case, whole):
    """What must not depend on ranks by a single bit; and the parameters' shares."""
    result = probe(case.policy, case.batch, case.direction, [-STEP, STEP] if whole else [STEP], token_budget=BUDGET)
    tables = {"base": result.base, "moved": result.changes[0].moved}
    if whole:
        for order, eta, kind in ((1, STEP, "difference"), (2, STEP, "difference"), (2, 0.0, "nested")):
            tables[f"{order} {eta} {kind}"] = measure(
                case.policy,
                case.batch,
                case.direction,
                order=order,
                eta=eta,
                second_order=kind,
                token_budget=BUDGET,
                keep_tokens=True,
            )
    found = {(name, column): values for name, table in tables.items() for column, values in table.columns().items()}
    for name, table in tables.items():
        found |= {(name, "token", field): x.numpy() for field, x in table.tokens._asdict().items() if x is not None}
    found |= {("rollouts.csv", name): values for name, values in result.columns().items()}
    found["mean discriminant"] = mean_discriminant(case.policy, case.batch, token_budget=BUDGET)
    return found | {"noise floors": np.array([change.noise_floor for change in result.changes])}, result.parameters


def shortage_of(case):
    """Microbatches that do not fit, on whichever rank; and the budget where every rank measures one."""
    limited(case.policy, 25)
    counts = []
    table = measure(case.policy, case.batch, case.direction, token_budget=70, progress=counts.append)
    return table.columns(), counts


def gradients_of(case):
    step = policy_gradient_step(case.policy, case.batch, step_size=STEP, optimizer="sgd", token_budget=BUDGET)
    a, b = np.random.default_rng(1).normal(size=(2, case.batch.n_tokens))
    return {name: g.numpy() for name, g in step.gradient.items()}, [
        g.numpy() for g in gradient(case.policy, case.batch, list(case.model.parameters()), a, b, token_budget=BUDGET)
    ]


def everything(whole):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        found = {}
        for dtype in DTYPES if whole else ["float32"]:
            case = Case(dtype)
            found[dtype] = {"tables": tables_of(case, whole), "gradients": gradients_of(case)}
            found[dtype]["shortage"] = shortage_of(case)
        return found


class Card(TokenBudget):
    """A budget as on a card: the first microbatch settles it, at `finds` tokens."""

    def __init__(self, finds):
        super().__init__(20, torch.device("cpu"))
        self._finds, self._measures = finds, True

    @contextmanager
    def trial(self, size):
        yield
        if self.measures:
            self.set_to(self._finds)


def measured_budget(rank):
    """The budget in the end, the microbatches that this rank ran, and the walk."""
    budget, ran = Card((50, 30, 60, 90)[rank]), []

    def run(microbatch):
        ran.append(microbatch.rollouts.tolist())
        return rank

    walked = [(m.rollouts.tolist(), result) for m, result in walk(random_batch(rollouts=24, seed=0), budget, run)]
    return budget.tokens, ran, walked


def errors_of(case, rank):
    """What every rank gets to know where one of them fails, in its own place, or differs."""
    last = dist.get_world_size() - 1

    def said_by(call):
        start = time.monotonic()
        try:
            call()
        except Exception as error:
            return type(error).__name__, str(error), time.monotonic() - start
        return None

    def failing(error):
        def fail(row):
            raise error

        with pytest.MonkeyPatch.context() as patch:
            if rank == last:
                patch.setattr(case.policy, "hidden", fail)
            measure(case.policy, case.batch, token_budget=1)  # work for every rank

    def refused_alone():
        eta = float("nan") if rank == last else 0.0
        return measure(case.policy, case.batch, case.direction, eta=eta)

    def short_of_room():
        with ranks.in_step():
            if rank == last:
                raise OSError("no room")

    other = random_batch(rollouts=24, seed=rank)
    moved = Direction({name: v + rank for name, v in case.direction.tensors.items()}, STEP)
    changed = Policy(random_model("llama", rank))
    return {
        "bug": said_by(lambda: failing(KeyError("a bug"))),
        "memory": said_by(lambda: failing(torch.OutOfMemoryError("too much"))),
        "refused alone": said_by(refused_alone),
        "in a step": said_by(short_of_room),
        "other rollouts": said_by(lambda: measure(case.policy, other)),
        "other budget": said_by(lambda: measure(case.policy, case.batch, token_budget=40 + rank)),
        "other direction": said_by(lambda: measure(case.policy, case.batch, moved)),
        "other policy": said_by(lambda: measure(changed, case.batch)),
        "none": said_by(lambda: measure(case.policy, case.batch)),
    }


def run_rank(rank, world, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    ranks.CHUNK = 100  # sums in several parts
    runs, hidden = [0], Policy.hidden

    def counted(policy, row):
        runs[0] += 1
        return hidden(policy, row)

    Policy.hidden = counted
    results = everything(world > 2) | {"runs": runs[0]}
    results |= {"measured budget": measured_budget(rank), "errors": errors_of(Case("float32"), rank)}
    with open(f"{directory}/{rank}.pickle", "wb") as file:
        pickle.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def world(request):
    return request.param


@pytest.fixture(scope="module")
def alone(world):
    """What one process gets."""
    return everything(world > 2)


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """What each rank got."""
    directory = tmp_path_factory.mktemp("ranks")
    return on_ranks(run_rank, world, directory, world, directory)


def test_tables_are_those_of_one_process_bit_for_bit(alone, results):
    for dtype in alone:
        want = alone[dtype]["tables"][0]
        for result in results:
            got = result[dtype]["tables"][0]
            assert got.keys() == want.keys()
            assert [name for name in want if got[name].tobytes() != want[name].tobytes()] == []


def test_what_does_not_fit_halves_the_budget_as_in_one_process(alone, results):
    for dtype in alone:
        want, counts = alone[dtype]["shortage"]
        for result in results:
            columns, counted = result[dtype]["shortage"]
            assert counted == counts
            assert all(columns[name].tobytes() == values.tobytes() for name, values in want.items())


def test_gradients_are_the_same_on_every_rank_and_but_for_rounding_those_of_one_process(alone, results):
    for dtype in alone:
        bar = {"float64": 1e-13, "float32": 1e-6}[dtype]
        want_step, want_sum = alone[dtype]["gradients"]
        shares = alone[dtype]["tables"][1]
        for result in results:
            step, total = result[dtype]["gradients"]
            first_step, first_total = results[0][dtype]["gradients"]
            assert all(step[name].tobytes() == first_step[name].tobytes() for name in want_step)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(total, first_total, strict=True))
            for got, want in [
                *((step[name], want_step[name]) for name in want_step),
                *zip(total, want_sum, strict=True),
            ]:
                assert np.abs(got - want).max() <= bar * np.abs(want).max()
            found, scale = result[dtype]["tables"][1], max(map(abs, shares.values()))
            assert max(abs(found[name] - shares[name]) for name in shares) <= 10 * bar * scale


def test_each_rank_runs_its_part(results):
    runs = [result["runs"] for result in results]
    assert max(runs) < 0.75 * len(runs) * min(runs)  # passes of few microbatches leave the last ranks without


def test_the_least_memory_decides_the_budget(results):
    assert {result["measured budget"][0] for result in results} == {30}
    walks = [[m for m, _ in result["measured budget"][2]] for result in results]
    assert all(walked == walks[0] for walked in walks)
    assert sorted(i for rollouts in walks[0] for i in rollouts) == list(range(1, 24))  # rollout 0 has no response
    firsts = [result["measured budget"][1][0] for result in results]
    assert all(first == walks[0][0] for first in firsts)
    for rank, result in enumerate(results):
        _, ran, walked = result["measured budget"]
        got = [value for _, value in walked]
        assert got[0] == (0 if rank == 0 else None)  # counted once
        assert set(got[1:]) <= {rank, None} and len(ran) - 1 == sum(value == rank for value in got[1:])


def test_what_one_rank_fails_with_ends_all(results):
    last = len(results) - 1
    for rank, errors in enumerate(results[r]["errors"] for r in range(len(results))):
        assert all(seconds < 60 for kind in errors.values() if kind is not None for seconds in kind[2:])
        said = {name: kind and kind[:2] for name, kind in errors.items()}
        if rank == last:
            assert said["bug"] == ("KeyError", "'a bug'")
        else:
            kind, text = said["bug"]
            assert kind == "RuntimeError" and text.startswith(f"rank {last} failed:\nTraceback") and "'a bug'" in text
        kind, text = said["memory"]
        assert kind == "MemoryError" and "do not fit into memory even alone" in text
        assert said["refused alone"] == ("ValueError", "eta: nan, expected a finite number")
        assert said["in a step"] == ("OSError", "no room")
        same = f"on the {len(results)} ranks, expected the same"
        assert said["other direction"][1].startswith(f"direction: not the same {same}")
        assert said["other policy"][1].startswith(f"policy: not the same {same}")
        for case in ("other rollouts", "other budget"):
            assert said[case][1].startswith(f"batch: the {len(results)} ranks have different rollouts or token budgets")
        assert said["none"] is None
