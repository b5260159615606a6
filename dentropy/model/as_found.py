"""A model in training is left as it was found, and so are the generators that training draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the model's buffers and every random state (PyTorch's on all devices, NumPy's, Python's)
    are the same afterwards, bit for bit.

    Weights, gradients and modes are not its business: passes never write the former and put back the latter.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> state = torch.get_rng_state()
        >>> with left_as_found(model):
        ...     _ = model(torch.randn(3, 2))
        >>> model.running_mean.tolist(), torch.equal(state, torch.get_rng_state())
        ([0.0, 0.0], True)
    """
    buffers = [
        (module._buffers, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 the global one, which training draws from
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        with torch.no_grad():
            for holder, name, buffer, values in buffers:
                holder[name] = buffer
                if values is not None and not torch.equal(buffer, values):
                    buffer.copy_(values)
