"""What an experiment is made of, in fingerprints of content: names and places of files do not count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from dentropy.experiment.entries import versions
from dentropy.model.direction import Direction
from dentropy.model.fingerprint import fingerprint, weights_fingerprint
from dentropy.model.policy import Policy
from dentropy.rollouts.batch import PackedBatch

LIBRARIES = ("dentropy", "torch", "transformers", "triton", "numpy")
# Of a configuration: where it came from and where it is, not what it is.
PLACES = ("_name_or_path", "transformers_version", "distributed_config")


def identity(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction | None,
    update: PackedBatch | None,
    settings: Mapping[str, object],
    weights: dict[str, str] | None = None,
) -> dict[str, str]:
    """By name, what the bits of a table depend on.

    Args:
        policy, batch, direction: of the experiment; direction None where it is made of `update`.
        update: the update's own rollouts.
        settings: all others, by name, as JSON can hold them.
        weights: `parameter_fingerprints` of the policy's model, where they are there already.
    """
    found = {"policy": policy_fingerprint(policy, weights), "rollouts": rollouts_fingerprint(batch)}
    if direction is not None:
        found["direction"] = fingerprint(sorted(direction.tensors.items()))
        found["direction's step size"] = repr(direction.step_size)
    if update is not None:
        found["update's rollouts"] = rollouts_fingerprint(update)
    return found | _settings(settings) | _surroundings(policy)


def draw_identity(policy: Policy, prompts: Sequence[Sequence[int]], settings: Mapping[str, object]) -> dict[str, str]:
    """By name, what a draw of rollouts depends on: the prompts as token ids, the settings as in `identity`."""
    found = {"policy": policy_fingerprint(policy), "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}
    return found | _settings(settings) | _surroundings(policy)


def _settings(settings: Mapping[str, object]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in settings.items()}


def _surroundings(policy: Policy) -> dict[str, str]:
    """What computes: the same code on another device need not give the same bits."""
    found = {"device": policy.device.type, "dtype": str(policy.dtype).removeprefix("torch.")}
    if policy.device.type == "cpu":
        found["threads"] = str(torch.get_num_threads())
    else:
        found["device"] = torch.cuda.get_device_name(policy.device)
    return found | {f"version of {name}": str(versions()[name]) for name in LIBRARIES}


def rollouts_fingerprint(batch: PackedBatch) -> str:
    """Of all that a batch holds."""
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return fingerprint((name, _tensor(value)) for name, value in columns.items() if value is not None)


def _tensor(value) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def policy_fingerprint(policy: Policy, weights: dict[str, str] | None = None) -> str:
    """Of a model's weights and configuration; `weights` as in `identity`."""
    config = {name: value for name, value in policy.config.to_dict().items() if name not in PLACES}
    said = json.dumps([type(policy.model).__name__, config], sort_keys=True, default=str)
    return hashlib.sha256((said + weights_fingerprint(policy.model, weights)).encode()).hexdigest()
