"""Tensors in the places of a model's parameters, one thread at a time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from torch import Tensor, nn

# What a pass changes belongs to the whole process: the places of parameters, which several policies may share, the
# precision of products, the level of forward mode. So threads take turns; one that has its turn may take it again.
TURN = threading.RLock()


def in_turn(function: Callable) -> Callable:
    """`function`, called by one thread at a time, and while no other is in a pass."""

    @wraps(function)
    def alone(*args, **kwargs):
        with TURN:
            return function(*args, **kwargs)

    return alone


@contextmanager
def in_place_of_parameters(model: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Puts tensors where the parameters with these id()s stand. A tied parameter is replaced wherever it is used."""
    with TURN:
        places = [
            (module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in tensors
        ]
        try:
            for parameters, name, parameter in places:
                parameters[name] = tensors[id(parameter)]
            yield
        finally:
            for parameters, name, parameter in places:
                parameters[name] = parameter
