"""A direction bound to a model: which parameter each tensor moves, in that parameter's dtype and on its device."""

import warnings
import weakref

import torch
from torch import Tensor, nn

from dentropy.model.adapter_layers import adapter_parameters
from dentropy.model.names import resolve, some
from dentropy.model.shards import is_shard, laid_out_as, whole


class Binding:
    """A model and the direction last used with it: its tensors as tangents of the parameters, checked and copied to
    their dtype and device once, not at every pass.

    There is one such copy for a model, and it goes with its Direction. It is made anew where parameters are no longer
    of the shape, dtype and device they were, or tied as they were.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._direction, self._tangents, self._form = None, {}, None

    def pairs(self, direction) -> list[tuple[nn.Parameter, Tensor]]:
        """As `Direction.on` says."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        meant = resolve("direction", direction.tensors, parameters)
        form = _form(direction, parameters, meant)
        if self._direction is None or self._direction() is not direction or form != self._form:
            self._bind(direction, parameters, meant, form)
        return [(parameters[name], v) for name, v in self._tangents.items()]

    def _bind(self, direction, parameters: dict[str, nn.Parameter], meant: dict[str, str], form) -> None:
        self._direction, self._tangents = None, {}  # before there is another copy
        moving = _moving(direction, self._model, parameters, meant)
        with torch.inference_mode(False):  # a pass in it would leave tensors that later ones could not use
            tangents = _cast(moving, parameters)
        # Only the dictionary is held by what runs when the Direction is gone.
        self._direction = weakref.ref(direction, lambda _: tangents.clear())
        self._tangents, self._form = tangents, form


def _moving(
    direction, model: nn.Module, parameters: dict[str, nn.Parameter], meant: dict[str, str]
) -> dict[str, Tensor]:
    """Name of each parameter that moves (the last of a tied one's) -> v, still as it is; ValueError as `Direction.on`.

    meant: name in the direction -> name in `parameters`. Warns of what is moved without effect."""
    unknown = [name for name in direction.tensors if name not in meant]
    buffers = set(unknown) & {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if unknown:
        raise ValueError(
            f"direction: {len(unknown)} of {len(direction.tensors)} names are not the policy's "
            f"({some(unknown)}), expected names such as {some(parameters)}"
            + (f"; {some(sorted(buffers))} is a buffer of it, which a direction cannot move" if buffers else "")
        )
    named: dict[int, str] = {}
    for name, v in direction.tensors.items():
        parameter = parameters[meant[name]]
        if v.shape != parameter.shape:
            raise ValueError(
                f"direction: {name} has shape {tuple(v.shape)}, expected the policy's {tuple(parameter.shape)}"
            )
        other = named.get(id(parameter))
        if other is not None and not torch.equal(direction.tensors[other], v):
            raise ValueError(
                f"direction: {other} and {name} are one tied parameter of the policy, expected equal tensors"
            )
        named[id(parameter)] = name
    effect = adapter_parameters(model)
    idle = [meant[name] for name in named.values() if not effect.get(meant[name], True)]
    if idle:
        warnings.warn(
            f"direction: {len(idle)} of the {len(named)} tensors that it moves are of adapters that are not active, "
            f"disabled or merged ({some(idle)}): they change nothing; set_adapter or unmerge_adapter makes them count",
            stacklevel=2,
        )
    return {meant[name]: direction.tensors[name] for name in named.values()}


def _form(direction, parameters: dict[str, nn.Parameter], meant: dict[str, str]) -> list[tuple]:
    """What a binding depends on, of every parameter that is named: shape, dtype, device, and which are tied."""
    first: dict[int, int] = {}
    named = [parameters.get(meant.get(name)) for name in direction.tensors]
    return [
        (None if p is None else (p.shape, p.dtype, p.device), first.setdefault(id(p), i)) for i, p in enumerate(named)
    ]


def _cast(moving: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Each v as the parameter's tangent, in parts where it is: such a one in its own dtype, if that is narrower, and
    wherever it is kept, since it is made whole at its module's turn. ValueError where the dtype cannot hold v."""
    moving = {name: laid_out_as(v, parameters[name]) for name, v in moving.items()}
    cast = {name: _as_tangent(v, parameters[name]) for name, v in moving.items()}
    _check_held(moving, cast)
    return cast


def as_held(name: str, v: Tensor, parameter: Tensor) -> Tensor:
    """v in the dtype in which it is kept beside a sharded parameter; ValueError where that cannot hold it."""
    cast = _as_tangent(v, parameter)
    _check_held({name: v}, {name: cast})
    return cast


def _as_tangent(v: Tensor, parameter: Tensor) -> Tensor:
    if not is_shard(parameter):
        return v.to(parameter.device, parameter.dtype)
    return v if torch.promote_types(v.dtype, parameter.dtype) == parameter.dtype else v.to(parameter.dtype)


def _check_held(moving: dict[str, Tensor], cast: dict[str, Tensor]) -> None:
    changed = [name for name, v in moving.items() if cast[name].dtype != v.dtype]  # the others were checked before
    moves = on_host({name: moving[name].any() for name in changed})
    holds = on_host({name: torch.isfinite(cast[name]).all() & cast[name].any() for name in changed if moves[name]})
    for name, held in holds.items():
        if not held:
            v = whole(moving[name])
            raise ValueError(
                f"direction: {name} reaches from {v[v != 0].abs().min():.1e} to {v.abs().max():.1e}, which "
                f"{cast[name].dtype} cannot hold, expected a scaled direction or a policy loaded in float32"
            )


def on_host(flags: dict[str, Tensor]) -> dict[str, bool]:
    """Scalars on any devices, read in one copy from each."""
    found, flags = {}, {name: whole(flag) for name, flag in flags.items()}
    for device in {flag.device for flag in flags.values()}:
        names = [name for name, flag in flags.items() if flag.device == device]
        found |= zip(names, torch.stack([flags[name] for name in names]).tolist(), strict=True)
    return {name: found[name] for name in flags}
