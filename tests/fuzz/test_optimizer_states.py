"""Saved optimizer states: files of torch.save, and the dictionaries in them."""

import copy
import io
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from harness import Format, run
from mangling import mangled, mangled_bytes
from models import random_model

from dentropy import PackedBatch, Policy
from dentropy.passes import policy_gradient
from dentropy.passes.optimizer_state import load_state
from dentropy.passes.policy_gradient import policy_gradient_direction


class Runs:
    """What a pickle may do: any call."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle ran",))


@cache
def policy():
    return Policy(random_model("llama"))


@cache
def good():
    model = policy().model
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adamw.step()
    adamw.zero_grad()
    state = adamw.state_dict()
    del state["param_groups"][0]["params"][4:]
    return {**state, "state": {key: state["state"][key] for key in range(4)}}


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def make(folder, random):
    path = folder / "state.pt"
    match random.randrange(8):
        case 0 | 1 | 2:
            data = mangled_bytes(saved(good()), random)
        case 3:
            old = saved(good(), _use_new_zipfile_serialization=False)
            data = random.choice([saved(Runs()), pickle.dumps(good()["param_groups"]), saved([1]), old])
        case 4 | 5:
            data = saved(with_odd_tensor(random))
        case _:
            data = saved(mangled(good(), random))
    path.write_bytes(data)
    return path


def with_odd_tensor(random):
    """A state with one entry that no AdamW leaves, or that it may leave."""
    state = copy.deepcopy(good())
    moment = state["state"][0]["exp_avg"]
    odd = [moment.to(torch.complex64), moment.int(), moment[:1], moment * float("nan"), -moment.abs() - 1]
    odd += [moment.to_sparse(), moment.bfloat16(), moment.abs(), torch.tensor(7.0), torch.tensor(0.0), 12]
    state["state"][random.randrange(4)][random.choice(["exp_avg", "exp_avg_sq", "step"])] = random.choice(odd)
    return state


@pytest.fixture
def read(monkeypatch):
    """As `dentropy probe --optimizer-state` does, with a gradient of ones for the first four parameters."""
    batch = PackedBatch.from_lists([[3], [3]], [[4], [5]], group=[0, 0], reward=[0, 1])
    monkeypatch.setattr(policy_gradient, "gradient", lambda _, __, parameters, *___, **____: ones(parameters))
    later = list(policy().model.parameters())[4:]
    for p in later:
        p.requires_grad_(False)

    def direction(path):
        state = load_state(path)
        v = policy_gradient_direction(policy(), batch, step_size=1e-6, optimizer_state=state)
        return state, v

    yield direction
    for p in later:
        p.requires_grad_(True)


def ones(parameters):
    return [torch.ones_like(p) for p in parameters]


def forbidden(path, found):
    state, direction = found
    shapes = {key: p.shape for key, p in zip(range(4), policy().model.parameters(), strict=False)}
    numbers = [key for group in state["param_groups"] for key in group["params"]]
    if len(numbers) != 4 or any(not torch.isfinite(v).all() for v in direction.tensors.values()):
        return f"its parameters are {numbers}"
    for key, moments in state["state"].items():
        for name in ("exp_avg", "exp_avg_sq") if moments else ():
            moment = moments[name]
            if moment.is_complex() or not np.isfinite(moment.float().numpy()).all():
                return f"state[{key}].{name} is {moment.dtype} or not finite"
            if key in numbers and moment.shape != shapes[numbers.index(key)]:
                return f"state[{key}].{name} has shape {moment.shape}"
            if name == "exp_avg_sq" and moment.min() < 0:
                return f"state[{key}].{name} is a square below 0"
        if moments and not 1 <= float(moments["step"]) < 1e19:
            return f"state[{key}].step is {moments['step']}"
    for group in state["param_groups"]:
        if not all(0 <= beta < 1 for beta in group["betas"]) or not 0 <= group["eps"] <= 1:
            return f"its settings are {group}"
    return None


@pytest.mark.parametrize("count", [250, pytest.param(500, marks=pytest.mark.slow)])
def test_optimizer_states(folder, read, count):
    counts = run(Format(count, make, read, forbidden, argument="optimizer_state"), folder)
    assert min(counts["read"], counts["refused"]) > count / 25
