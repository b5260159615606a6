"""A model in training seen in float32: copies in the places of half-precision weights, and no autocast around it.

In bf16 arithmetic the change of entropy of one small step drowns in rounding. The model itself is not converted: copies
stand in the places of its parameters while something is measured, as moved weights do in a pass.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dentropy.model.in_place import in_place_of_parameters
from dentropy.model.usable import ORIGINAL_FORWARD


def is_half(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize < 4


@contextmanager
def in_float32(model: nn.Module, instead: Mapping[int, Tensor] | None = None, *, copies: bool = True) -> Iterator[None]:
    """Inside, the model's half-precision parameters are float32 copies, and its forward is its own, not autocast.

    Args:
        model: left as found, bit for bit, also where what is inside raises.
        instead: for the id() of a parameter, other values for it (its values before a step, say).
        copies: whether half precision becomes float32; else only `instead` and the forward change.
    """
    instead, tensors = instead or {}, {}
    for p in model.parameters():
        x = instead.get(id(p), p.detach())
        if copies and is_half(x):
            x = x.to(torch.float32)
        if id(p) in instead or x.dtype != p.dtype:
            tensors[id(p)] = x
    with _without_autocast(model), in_place_of_parameters(model, tensors):
        yield


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    own = vars(model)
    if ORIGINAL_FORWARD not in own or "forward" not in own:
        yield
        return
    found = own["forward"]
    own["forward"] = own[ORIGINAL_FORWARD]
    try:
        yield
    finally:
        own["forward"] = found
