"""What tensors hold, in 64 digits: whether weights are those of before, or those of another process."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from dentropy.model.shards import own_part, whole

CHUNK = 2**24  # elements that are in host memory at a time
_under_watch: ContextVar[tuple[nn.Module, ...]] = ContextVar("models that `unchanged` looks at", default=())


class WeightsChangedError(ValueError):
    """Of a policy, in the middle of what it was to stay the same for."""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, wherever the tensors are; in the order given. What ranks hold in
    parts is put together, one tensor at a time: all of them must come here.

    Example:
        >>> one = torch.ones(2)
        >>> fingerprint([("a", one)]) == fingerprint([("a", one.clone())]) != fingerprint([("b", one)])
        True
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        for part in whole(tensor.detach()).reshape(-1).split(CHUNK):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def unchanged(model: nn.Module, before: dict[str, str] | None = None) -> Iterator[None]:
    """Raises WeightsChangedError, at the end, where a parameter is no longer what it was at the beginning, naming it.

    A model is hashed once at the beginning, unless `before` has its `parameter_fingerprints` already, and once at the
    end: inside of another of the same model this one does nothing.
    """
    if model in _under_watch.get():
        yield
        return
    before = parameter_fingerprints(model) if before is None else before
    token = _under_watch.set((*_under_watch.get(), model))
    try:
        yield
    finally:
        _under_watch.reset(token)
    now = parameter_fingerprints(model)
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise WeightsChangedError(
            f"policy: {changed[0]}{more} changed while the passes ran, expected weights that stay: what was measured "
            "is of no one policy"
        )


def parameter_fingerprints(model: nn.Module) -> dict[str, str]:
    """One for each parameter, or this rank's part of it, by name."""
    return {name: fingerprint([(name, own_part(p.detach()))]) for name, p in model.named_parameters()}


def weights_fingerprint(model: nn.Module, parameters: dict[str, str] | None = None) -> str:
    """That of a model's parameters, or of these `parameter_fingerprints` of it, and of its buffers."""
    parameters = parameter_fingerprints(model) if parameters is None else parameters
    return hashlib.sha256(f"{parameters} {fingerprint(model.named_buffers())}".encode()).hexdigest()
