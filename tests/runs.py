"""A small real run, made once."""

import dataclasses
from functools import cache

import numpy as np
from models import random_direction, random_model

from dentropy import Direction, Policy, ProbeResult, probe, sample
from dentropy.experiment.probe import fresh_check

STEP = 0.01
ETAS = (-STEP, 0.5 * STEP, STEP, 4 * STEP)


@cache
def small_run() -> ProbeResult:
    """A random policy of 2 layers probed at ETAS on 32 rewarded rollouts of 4 prompts, with all that a run can have."""
    policy = Policy(random_model("llama"))
    batch = sample(policy, [[5, 6, 7], [8], [9, 10], [11]], per_prompt=8, max_new_tokens=12)
    batch = dataclasses.replace(batch, reward=np.random.default_rng(0).random(len(batch)))
    found = probe(policy, batch, Direction(random_direction(policy.model).tensors, STEP), ETAS)
    return dataclasses.replace(
        found,
        seeds={"rollouts": 0},
        source={"policy": "random"},
        fresh=fresh_check(found, ETAS[-1], found.changes[-1].moved),
    )
