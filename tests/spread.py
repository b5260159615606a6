"""What models that are spread over ranks are held against the whole ones by."""

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from models import random_batch, random_direction

from dentropy import (
    Direction,
    mean_discriminant,
    measure,
    parameter_attribution,
    policy_gradient_step,
    probe,
    update_attribution,
)
from dentropy.model.shards import own_part, whole
from dentropy.passes.reverse_mode import gradient

WORLD, STEP = 2, 1e-3
BUDGET = 50  # of three microbatches on two ranks one is run for nothing
QUICK = ((1, 10 * STEP),)
PASSES = ((0, 0.0), (0, STEP), (1, 0.0), (1, 10 * STEP), (2, 0.0))


def batch_of(seed, rollouts):
    group, reward = np.arange(rollouts) // 3, np.random.default_rng(seed).random(rollouts)
    return dataclasses.replace(random_batch(seed, rollouts=rollouts), group=group, reward=reward)


def direction_of(model):
    """Of the adapters where it has any."""
    adapted = any("lora_" in name for name, _ in model.named_parameters())
    moving = random_direction(model, names=lambda name: not adapted or "lora_" in name)
    return Direction(moving.tensors, STEP)


def numbers(policy, direction, quick):
    """By name, all that must be that of the whole model; `quick`: a pass with tangents and a gradient."""
    batch, other, settings = batch_of(0, 12), batch_of(3, 9), {"token_budget": BUDGET}
    found = {}
    for order, eta in QUICK if quick else PASSES:
        table = measure(policy, batch, direction, order=order, eta=eta, **settings)
        found |= {f"{order} {eta} {name}": values for name, values in table.columns().items()}
    parameters = dict(policy.model.named_parameters())
    weights = np.random.default_rng(1).normal(size=(2, batch.n_tokens))
    of_all = gradient(policy, batch, list(parameters.values()), *weights, **settings)
    found |= {f"gradient {name}": whole(g).numpy() for name, g in zip(parameters, of_all, strict=True)}
    found["mean discriminant"] = mean_discriminant(policy, batch, **settings)
    if quick:
        return found
    step = policy_gradient_step(policy, batch, step_size=STEP, max_grad_norm=0.1, **settings)
    v = step.direction()
    found |= {f"v {name}": whole(x).numpy() for name, x in v.tensors.items()}
    sums = measure(policy, other, v, keep_tokens=True, **settings)
    shares = parameter_attribution(policy, other, v, sums, **settings)
    found["parameters"] = np.array([shares[name] for name in sorted(shares)])
    explained = update_attribution(policy, other, step, sums, **settings)
    found["tokens"] = explained.share
    found["terms"] = np.array([explained.total, explained.cosine, explained.noise_fraction, v.norm()])
    result = probe(policy, batch, direction, [-STEP, STEP], **settings)
    found["floors"] = np.array([change.noise_floor for change in result.changes])
    found["changes"] = np.array([change.measured.delta for change in result.changes])
    found["all parameters"] = np.array([result.parameters[name] for name in sorted(result.parameters)])
    return found


def differences(found, want):
    """By name, the largest one over the largest value."""
    named = {name: (found[name], values) for name, values in want.items() if name != "own" and values.size}
    return {name: np.abs(x - y).max() / max(np.abs(y).max(), 1e-300) for name, (x, y) in named.items()}


def own_gradient(model):
    """Of a step of training."""
    model.zero_grad()
    if getattr(model.config, "num_local_experts", None):
        model.set_experts_implementation("eager")  # grouped products have no float64
    tokens = torch.arange(3, 15)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    found = {name: whole(p.grad).numpy() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_parts(direction, model, path):
    """The direction as each rank reads its part of it from a file."""
    if dist.get_rank() == 0:
        direction.save(path)
    dist.barrier()
    found = Direction.load(path, model)
    assert all(own_part(v).shape == own_part(model.get_parameter(name)).shape for name, v in found.tensors.items())
    return found


def refused(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def failing(error):
    def fail(*_, **__):
        raise error

    return fail
