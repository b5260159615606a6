"""A model in training, as a policy to measure: in float32 where its weights are not, and left as it was found."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dentropy.model.as_found import left_as_found
from dentropy.model.float32_copies import in_float32, is_half
from dentropy.model.memory import available_memory
from dentropy.model.policy import Policy
from dentropy.passes import ranks

# Weights, gradients, the copies of a step and its difference, in float32, beside the optimizer's own tensors.
COPIES_OF_A_STEP = 4
BYTES = 4  # of a float32
GIB = 2**30


class WatchedPolicy:
    """The model between the steps of its training; make one for all of them.

    Args:
        model: a causal language model of transformers, PEFT's included, or a Policy of one.
        optimizer: that trains it.

    Attributes:
        model: as given.
        in_float32: whether it is measured in float32: not where weights are of half precision, which a warning says
            with what float32 copies need, and these do not fit.
    """

    def __init__(self, model: nn.Module | Policy, optimizer: torch.optim.Optimizer):
        self.model = model.model if isinstance(model, Policy) else model
        self._policy = model if isinstance(model, Policy) else None
        self.in_float32 = True
        half = [p for p in self.model.parameters() if is_half(p)]
        if half:
            self.in_float32 = _announce(half[0], bytes_needed(self.model, optimizer))

    @contextmanager
    def policy(self, instead: Mapping[int, Tensor] | None = None) -> Iterator[Policy]:
        """The policy, for the time of a measurement; `instead` as in `in_float32`. Raises as `Policy` does."""
        with left_as_found(self.model), in_float32(self.model, instead, copies=self.in_float32):
            if self._policy is None:
                self._policy = Policy(self.model)
            yield self._policy


def _announce(parameter: Tensor, needed: int) -> bool:
    """Says what the float32 copies need; whether there is room for them."""
    found = ranks.exchange(available_memory(parameter.device))
    free = None if None in found else min(found)
    said = f"model: weights are {parameter.dtype}, measured on float32 copies, which need {needed / GIB:.2f} GiB"
    if free is None or needed <= free:
        warnings.warn(f"{said} at a recorded step, beside the activations of a pass", stacklevel=3)
        return True
    warnings.warn(
        f"{said}; {free / GIB:.2f} GiB are free, so passes run in {parameter.dtype}, without second order, and "
        "rounding may hide the change of a small step",
        stacklevel=3,
    )
    return False


def bytes_needed(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What float32 copies of half-precision weights take at a recorded step: for its passes those of all weights, and
    the step's own, `COPIES_OF_A_STEP` and the optimizer's state."""
    trained = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    state = [x for p in trained.values() for x in optimizer.state.get(p, {}).values() if isinstance(x, Tensor)]
    numbers = sum(p.numel() for p in model.parameters() if is_half(p)) + sum(x.numel() for x in state)
    return BYTES * (numbers + COPIES_OF_A_STEP * sum(p.numel() for p in trained.values()))
