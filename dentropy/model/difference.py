"""The two sides of an update: their tensors by name, and what of them differs."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dentropy.model.adapter_layers import adapter_parameters
from dentropy.model.adapters import adapter_as_update, adapter_tensors, check_same_adapter, is_adapter_folder
from dentropy.model.checkpoint import is_constant, load_checkpoint
from dentropy.model.in_parts import stays_on_host
from dentropy.model.names import canonical, is_adapters, resolve, some
from dentropy.model.shards import from_own_part, is_shard, own_part, whole

# A difference of two bf16 checkpoints with more zeros than this has lost most of the update to rounding.
MOSTLY_ZERO = 0.5
# One unit in bf16, relative: as far apart as a constant and its rounding may be.
ROUNDING = 2.0**-7

Side = dict[str, Tensor]


def difference(before, after, trust_remote_code: bool = False, shard: bool = False) -> Side:
    """after − before of every tensor that differs, under before's names, in float32 or the wider of the two dtypes.

    Equal values, infinite ones too (−∞ on the padding rows of a vocabulary), have the difference 0.

    Raises:
        ValueError: as `Direction.between` says.
    """
    before, after = _sides(before, after, trust_remote_code, shard)
    warn_if_rounded_away(before, after, list(before))
    shards = [x for x in before.values() if is_shard(x)]
    host = stays_on_host(shards, [torch.float32.itemsize] * len(shards))
    found = {}
    for name, x in before.items():
        y = after[name].to(x.device)
        if not torch.equal(x, y):
            if not (x.is_floating_point() and y.is_floating_point()):
                raise ValueError(f"after: {name} is {y.dtype} and differs from before, expected floating weights alone")
            wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
            x, y = x.to(wide), y.to(wide)
            v = (y - x).masked_fill_(x == y, 0.0)
            found[name] = from_own_part(own_part(v).cpu(), v, on_host=True) if host and is_shard(v) else v
    return found


def _sides(before, after, trust_remote_code: bool, shard: bool) -> tuple[Side, Side]:
    """The weights of both sides under before's names; ValueError where anything else differs."""
    sides = {"before": before, "after": after}
    adapted = {argument: _has_adapters(side) for argument, side in sides.items()}
    if adapted == {"before": False, "after": True} and is_adapter_folder(after) and not isinstance(before, Mapping):
        return adapter_as_update(before, after, trust_remote_code, shard)
    for argument, has in adapted.items():
        if not has and any(adapted.values()):
            raise ValueError(
                f"{argument}: has no adapter, and the other side has one; expected adapters on both sides or on none, "
                "or a base model (or its folder) as before and an adapter folder as after. An adapter is merged into "
                "its base model by merge_and_unload()"
            )
    files = [side for side in sides.values() if is_adapter_folder(side)]
    if len(files) == 2:
        check_same_adapter(before, after)
    weights, state = {}, {}
    for argument, side in sides.items():
        weights[argument], state[argument] = _tensors(side, argument, trust_remote_code, shard)
    if len(files) == 1:
        one, other = ("before", "after") if is_adapter_folder(before) else ("after", "before")
        weights[other] = _in_an_adapter_file(weights[other], sides[other], weights[one])
        state = {"before": {}, "after": {}}  # of the base model, which is not in the file
    _check_state(weights, state)
    return _under_common_names(**weights)


def _has_adapters(side) -> bool:
    if isinstance(side, nn.Module):
        return any(is_adapters(name) for name, _ in side.named_parameters())
    return any(map(is_adapters, map(str, side))) if isinstance(side, Mapping) else is_adapter_folder(side)


def _tensors(side, argument: str, trust_remote_code: bool, shard: bool) -> tuple[Side, Side]:
    """(weights, other state) of a model, a state dict, a checkpoint folder or an adapter folder, by name."""
    if is_adapter_folder(side):
        return adapter_tensors(side, argument), {}
    if isinstance(side, nn.Module):
        saved, buffers = side.state_dict().keys(), dict(side.named_buffers(remove_duplicate=False))
        weights = {name: p.detach() for name, p in side.named_parameters(remove_duplicate=False)}
        return weights, {name: x.detach() for name, x in buffers.items() if name in saved or is_constant(name, x.ndim)}
    if isinstance(side, Mapping):
        inner = [str(name) for name, x in side.items() if isinstance(x, Mapping)]
        if inner:
            raise ValueError(f"{argument}: a dict around others ({some(inner)}), expected the state dict itself")
        tensors = {name: x.detach() for name, x in side.items() if isinstance(x, Tensor)}
        state = {name: x for name, x in tensors.items() if is_constant(name, x.ndim)}
        return {name: x for name, x in tensors.items() if name not in state}, state
    if not Path(side).is_dir():
        raise ValueError(f"{argument}: {side}: no such folder, expected a model, a state dict or a checkpoint folder")
    model = load_checkpoint(side, argument, "auto", trust_remote_code=trust_remote_code, shard=shard)
    return _tensors(model, argument, trust_remote_code, shard)


def _in_an_adapter_file(weights: Side, side, saved: Side) -> Side:
    """Of a side's weights those that an adapter file holds: its active adapter's, and what else `saved` names."""
    active = adapter_parameters(side) if isinstance(side, nn.Module) else {}
    names = {canonical(name) for name in saved}
    return {
        name: x
        for name, x in weights.items()
        if active.get(name, True) and (is_adapters(name) or canonical(name) in names)
    }


def _check_state(weights: dict[str, Side], state: dict[str, Side]) -> None:
    """ValueError where what is no parameter (a router's bias, say) differs: a direction could not move it.

    A state dict does not tell its buffers from its weights: they are moved to its state where the other side does."""
    for side, other in (("before", "after"), ("after", "before")):
        for name in state[other]:
            if name in weights[side]:
                state[side][name] = weights[side].pop(name)
    for side, other in (("before", "after"), ("after", "before")):
        lost = [name for name, x in state[other].items() if name not in state[side] and not is_constant(name, x.ndim)]
        if lost:
            raise ValueError(
                f"{side}: {len(lost)} buffers are missing ({some(lost)}), expected the same names on both sides"
            )
    for name, x in state["before"].items():
        y = state["after"].get(name)
        if y is not None and not _same_state(name, x, y.to(x.device)):
            raise ValueError(
                f"after: {name}, a buffer and no parameter, differs from before, expected updates of parameters "
                "alone, which a direction can follow; made equal on both sides, it is left out"
            )


def _same_state(name: str, x: Tensor, y: Tensor) -> bool:
    if is_constant(name, x.ndim) and not name.endswith("inv_freq"):
        return True
    if x.shape == y.shape and x.dtype != y.dtype:
        return bool(torch.isclose(x.double(), y.double(), rtol=ROUNDING, atol=0.0, equal_nan=True).all())
    return torch.equal(x, y)


def _under_common_names(before: Side, after: Side) -> tuple[Side, Side]:
    """Both sides under before's names; a name on one side alone must be an alias of a tensor that both have."""
    meant = resolve("after", before, after)
    common = {name: after[meant[name]] for name in before if name in meant}
    used = set(meant.values())
    for argument, lone in (
        ("after", {name: x for name, x in before.items() if name not in meant}),
        ("before", {name: x for name, x in after.items() if name not in used}),
    ):
        twins = before if argument == "after" else common
        missing = [name for name, x in lone.items() if not any(_is_alias(x, twins[c]) for c in common)]
        if missing:
            raise ValueError(
                f"{argument}: {len(missing)} tensors are missing ({some(missing)}), expected the same names on both "
                "sides"
            )
    for name, y in common.items():
        if before[name].shape != y.shape:
            raise ValueError(
                f"after: {name} has shape {tuple(y.shape)}, expected that of before, {tuple(before[name].shape)}"
            )
    return {name: before[name] for name in common}, common


def _is_alias(x: Tensor, y: Tensor) -> bool:
    """Equal by value, as tied weights are in a state dict; constant tensors (norms, biases) are equal by accident."""
    return x.shape == y.shape and torch.equal(x, y) and bool((x != x.flatten()[0]).any())


def warn_if_rounded_away(before: dict[str, Tensor], after: dict[str, Tensor], names: list[str]) -> None:
    half = [
        n
        for n in names
        if before[n].is_floating_point() and before[n].dtype.itemsize == 2 and after[n].dtype.itemsize == 2
    ]
    total = sum(before[n].numel() for n in half)
    equal = sum(int(whole((before[n] == after[n].to(before[n].device)).sum())) for n in half)
    if total and equal / total > MOSTLY_ZERO and equal < total:
        warnings.warn(
            f"after: {equal / total:.0%} of the half-precision weights are equal to before; updates below "
            "1/256 of a weight vanish in bf16. Compare float32 (master) weights to see the whole update",
            stacklevel=3,
        )
