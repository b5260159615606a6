"""What tensors hold, in 64 digits: whether weights are those of before, or those of another process."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dentropy.model.shards import own_part, whole

CHUNK = 2**24  # elements that are in host memory at a time


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


def check_unchanged(model: nn.Module, before: dict[str, str]) -> None:
    """ValueError naming a parameter that is no longer what it was in `before`, of `parameter_fingerprints`."""
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


def weights_fingerprint(model: nn.Module) -> str:
    """That of a model's parameters and buffers."""
    return fingerprint([*model.named_parameters(), *model.named_buffers()])
