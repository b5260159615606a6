"""A saved optimizer, taken up again: whose moments are whose, how it is set, and the step it takes next.

    AdamW   m ← β1 m + (1 − β1) g ,  s ← β2 s + (1 − β2) g² ,  v = −ρ [ (m/(1 − β1ᵗ)) / (√(s/(1 − β2ᵗ)) + ε) + λ θ ] ,
    SGD     b ← μ b + (1 − d) (g + λ θ) ,  v = −ρ b ,  with Nesterov's  v = −ρ (g + λ θ + μ b) ,

ρ the parameter's learning rate in units of the step size (Loshchilov and Hutter 2019; amsgrad: the largest s so far;
Adam, with coupled decay: g + λ θ in place of g, and no λ θ behind). Both are v = −ρ (P ∘ γ g + momentum + decay).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dentropy.doors import saved_by_torch
from dentropy.model.names import resolve, some
from dentropy.model.shards import laid_out_as

FILE = "optimizer.pt"  # the name under which trainers save it in a checkpoint's folder
MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST = "max_exp_avg_sq"  # with amsgrad
BUFFER = "momentum_buffer"  # of an SGD
# name -> from this number to below that one; at an eps of 0 a step could be 0/0
SETTINGS = {"lr": (0.0, math.inf), "weight_decay": (0.0, math.inf)}
ADAM_SETTINGS = SETTINGS | {"eps": (1e-30, 1.0)}
SGD_SETTINGS = SETTINGS | {"momentum": (0.0, math.inf), "dampening": (-math.inf, math.inf)}
STEPS = (1, 2**53)
OPTIMIZERS = ("sgd", "adam", "adamw")
NOT_DIAGONAL = (
    "Muon's step orthogonalizes the momentum of whole matrices: it is no diagonal times the gradient, so no token has "
    "a share of it"
)
# Learning rates this close, relative, are one: a scheduler computes them.
SAME_RATE = 1e-6
EXPECTED = "expected the state_dict() of a torch.optim.AdamW, or the Adam or SGD that `optimizer` names"


class Parts(NamedTuple):
    """A parameter's step, v = −(gain ∘ g + momentum + decay), on the loss whose gradient is g.

    `gain` is ρ γ P. Of Adam it depends on g: it is that of the second moment after the step. Each is a tensor of the
    parameter's shape, in the gradient's dtype, or a number that stands for one.
    """

    gain: Tensor | float
    momentum: Tensor | float
    decay: Tensor | float

    def step(self, gradient: Tensor) -> Tensor:
        """v."""
        return -(self.gain * gradient + self.momentum + self.decay)


@dataclass(frozen=True)
class SGD:
    """The SGD of one parameter: settings, `rate` (its learning rate in units of the step size), and its momentum so far
    (b above), None at first."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    rate: float = 1.0
    buffer: Tensor | None = None

    def parts(self, parameter: Tensor, gradient: Tensor) -> Parts:
        """Of the next step; as `AdamW.parts`."""
        mu, fresh = self.momentum, self.buffer is None
        kept = 1.0 if fresh else 1.0 - self.dampening  # the first gradient is not dampened
        gain = self.rate * (1 + mu * kept if self.nesterov else kept)
        carried = 0.0 if fresh else self.rate * (mu**2 if self.nesterov else mu) * _like(self.buffer, gradient)
        return Parts(gain, carried, _times_parameter(gain * self.weight_decay, parameter, gradient))


@dataclass(frozen=True)
class AdamW:
    """The AdamW of one parameter: settings, `rate` (its learning rate in units of the step size), and the moments and
    steps so far, empty at first. `coupled` makes it an Adam, whose weight decay is part of the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    coupled: bool = False
    rate: float = 1.0
    steps: int = 0
    moments: Mapping[str, Tensor] | None = None

    def parts(self, parameter: Tensor, gradient: Tensor) -> Parts:
        """Of the next step on the loss whose gradient is given, in the gradient's dtype: float32 or better, where
        neither ε nor a small moment vanishes, whatever the parameter's own dtype."""
        b1, b2 = self.betas
        coupled = self.coupled and self.weight_decay > 0
        used = gradient + _times_parameter(self.weight_decay, parameter, gradient) if coupled else gradient
        s, t = (1 - b2) * used**2, self.steps + 1
        if self.moments is not None:
            s += b2 * _like(self.moments["exp_avg_sq"], gradient)
        if self.amsgrad and self.moments is not None:
            s = torch.maximum(s, _like(self.moments[LARGEST], gradient))
        scale = self.rate / ((s / (1 - b2**t)).sqrt_().add_(self.eps) * (1 - b1**t))  # ρ P / (1 − β1ᵗ)
        gain = (1 - b1) * scale
        carried = 0.0 if self.moments is None else b1 * scale * _like(self.moments["exp_avg"], gradient)
        decay = _times_parameter(self.weight_decay * (1.0 if coupled else self.rate), parameter, gradient)
        return Parts(gain, carried, gain * decay if coupled else decay)


def _like(saved: Tensor, gradient: Tensor) -> Tensor:
    return laid_out_as(saved, gradient).to(gradient)


def _times_parameter(factor: float, parameter: Tensor, gradient: Tensor) -> Tensor | float:
    return factor * parameter.detach().to(gradient) if factor else 0.0


def state_file(path: str | Path) -> Path:
    """That of a saved optimizer: `path`, or the one inside where it is a checkpoint's folder."""
    inside = Path(path) / FILE
    return inside if inside.is_file() else Path(path)


def load_state(path: str | Path) -> dict:
    """The state_dict() of an optimizer, in a file or in a checkpoint's folder; ValueError where there is none."""
    expected = f"an optimizer's state_dict() by torch.save, or a folder with {FILE}"
    state = saved_by_torch(state_file(path), expected, "optimizer_state")
    if not isinstance(state, dict):
        raise ValueError(f"optimizer_state: {path}: a {type(state).__name__}, expected an optimizer's state_dict()")
    return state


def saved_optimizer(
    kind: str, state, shapes: Mapping[str, Sequence[int]], step_size: float
) -> dict[str, AdamW] | dict[str, SGD]:
    """The optimizer of each parameter in a saved state, under the policy's names; parameters it leaves out do not move.

    Parameters are told apart by name where the state has names (`param_names`, as optimizers made with
    `named_parameters()` save them, or names as keys). Without names their order is taken for the policy's, which only
    their number and shapes can confirm, with a warning; groups must then be one, or weights (of two dimensions and
    more) before biases and norms, at one learning rate.

    Where groups differ in learning rate, `step_size` must be one of the rates: v is the whole step in units of it.

    Args:
        kind: one of OPTIMIZERS.
        state: its state_dict, or a dict with one of these in it.
        shapes: name -> shape of each parameter that could move, in the policy's order.
        step_size: what v is divided by.

    Raises:
        ValueError: naming what is not this optimizer's, or not this policy's.
    """
    state = _unwrapped(state)
    entries = {key: None if entry == {BUFFER: None} else entry for key, entry in state["state"].items()}
    groups = [
        _checked(kind, group, f"optimizer_state: param_groups[{i}]") for i, group in enumerate(state["param_groups"])
    ]
    owners = _owners(groups, shapes)
    unknown = [repr(key) for key in entries if key not in owners]
    if unknown:
        raise ValueError(f"optimizer_state: entries of no parameter of its groups ({some(unknown)}), {EXPECTED}")
    rates = _rates(groups, step_size)
    found, fresh = {}, []
    for group, rate in zip(groups, rates, strict=True):
        for key in group["params"]:
            name = owners[key]
            entry, where = entries.get(key) or None, f"optimizer_state: {name}"
            found[name] = (_sgd if kind == "sgd" else _adam)(group, rate, entry, shapes[name], where)
            if entry is None and (kind != "sgd" or group["momentum"]):
                fresh.append(name)  # it never had a gradient
    if len(found) < len(shapes):
        warnings.warn(
            f"optimizer_state: of {len(found)} of the policy's {len(shapes)} parameters; the others do not move",
            stacklevel=3,
        )
    if fresh:
        warnings.warn(
            f"optimizer_state: {len(fresh)} of its {len(found)} parameters have no moments ({some(fresh)}) and start "
            "anew",
            stacklevel=3,
        )
    return found


def _unwrapped(state) -> dict:
    """The optimizer's own dict, also out of one around it that holds no other."""
    if not isinstance(state, Mapping):
        raise ValueError(f"optimizer_state: a {type(state).__name__}, {EXPECTED}")
    if "param_groups" not in state:
        inside = {key: value for key, value in state.items() if isinstance(value, Mapping) and "param_groups" in value}
        if len(inside) != 1:
            what = f"{len(inside)} optimizers ({some(map(str, inside))})" if inside else "no param_groups"
            raise ValueError(f"optimizer_state: {what} in it, only {some(map(str, state)) or 'nothing'}; {EXPECTED}")
        return _unwrapped(next(iter(inside.values())))
    groups = state["param_groups"]
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(f"optimizer_state: param_groups is no list of groups, {EXPECTED}")
    if not isinstance(state.get("state"), Mapping):
        raise ValueError(f"optimizer_state: no 'state' beside its param_groups, {EXPECTED}")
    return dict(state)


def _checked(kind: str, group: Mapping, where: str) -> dict:
    """A group with its numbers as floats; ValueError for what such an optimizer's groups do not have."""
    keys, names = group.get("params"), group.get("param_names")
    if not isinstance(keys, list) or not all(isinstance(key, (int, str)) for key in keys):
        raise ValueError(f"{where}: params: {keys!r:.40}, expected a list of the parameters' numbers or names")
    if names is not None and (
        not isinstance(names, list) or len(names) != len(keys) or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"{where}: param_names: {names!r:.40}, expected a name for each of its {len(keys)} params")
    if "ns_steps" in group:
        raise ValueError(f"{where}: {NOT_DIAGONAL}; {EXPECTED}")
    checked = (_checked_sgd if kind == "sgd" else _checked_adam)(kind, group, where)
    if kind != "adam" and checked["lr"] * checked["weight_decay"] >= 1:
        raise ValueError(
            f"{where}: weight_decay: {checked['weight_decay']:g} at a learning rate of {checked['lr']:g}, expected a "
            "decay that leaves something of the weights"
        )
    return dict(group) | checked


def _checked_adam(kind: str, group: Mapping, where: str) -> dict:
    if "momentum" in group:
        raise ValueError(f"{where}: has momentum, as an SGD's, {EXPECTED}")
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{where}: betas: {betas!r:.40}, expected two numbers below 1; {EXPECTED}")
    checked = {"betas": tuple(_number(beta, 0.0, 1.0, f"{where}: betas") for beta in betas)}
    checked |= {name: _number(group.get(name), *bounds, f"{where}: {name}") for name, bounds in ADAM_SETTINGS.items()}
    if not isinstance(group.get("amsgrad"), bool):  # RAdam, LAMB and others have moments of the same names
        raise ValueError(f"{where}: amsgrad: {group.get('amsgrad')!r:.40}, expected True or False; {EXPECTED}")
    decoupled = group.get("decoupled_weight_decay", kind == "adamw")
    if checked["weight_decay"] and kind == "adamw" and not decoupled:
        raise ValueError(f"{where}: of an Adam with coupled weight decay, expected an AdamW's, or optimizer='adam'")
    if checked["weight_decay"] and kind == "adam" and decoupled:
        raise ValueError(f"{where}: of an AdamW with decoupled weight decay, expected an Adam's, or optimizer='adamw'")
    return checked | {"coupled": kind == "adam"}


def _checked_sgd(kind: str, group: Mapping, where: str) -> dict:
    if "betas" in group:
        raise ValueError(f"{where}: has betas, as an Adam's, expected the state_dict() of a torch.optim.SGD")
    checked = {name: _number(group.get(name), *bounds, f"{where}: {name}") for name, bounds in SGD_SETTINGS.items()}
    if not isinstance(group.get("nesterov"), bool):
        raise ValueError(f"{where}: nesterov: {group.get('nesterov')!r:.40}, expected True or False; {EXPECTED}")
    return checked


def _owners(groups: list[Mapping], shapes: Mapping[str, Sequence[int]]) -> dict[int | str, str]:
    """Key of each parameter in the state -> its name in the policy."""
    keys = [key for group in groups for key in group["params"]]
    names = [name for group in groups for name in group.get("param_names") or group["params"]]
    if len(set(keys)) != len(keys):
        raise ValueError(f"optimizer_state: a parameter is in its groups twice, {EXPECTED}")
    if not all(isinstance(name, str) for name in names):
        if any(isinstance(name, str) for name in names):
            raise ValueError("optimizer_state: names for some of its parameters, expected them for all or for none")
        return dict(zip(keys, _in_order(groups, shapes), strict=True))
    meant = resolve("optimizer_state", names, shapes)
    unknown = [name for name in names if name not in meant]
    if unknown:
        raise ValueError(
            f"optimizer_state: {len(unknown)} of its {len(names)} names are not the policy's ({some(unknown)}), "
            f"expected names such as {some(shapes)}"
        )
    owners = {key: meant[name] for key, name in zip(keys, names, strict=True)}
    if len(set(owners.values())) != len(owners):
        raise ValueError("optimizer_state: two of its names are one parameter of the policy, expected each once")
    return owners


def _in_order(groups: list[Mapping], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The policy's names in the order in which a state without names has its parameters."""
    sizes = [len(group["params"]) for group in groups if group["params"]]
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    vectors = [name for name in shapes if name not in set(matrices)]
    if sum(sizes) != len(shapes):
        raise ValueError(f"optimizer_state: for {sum(sizes)} parameters, expected the policy's {len(shapes)}")
    rates = {group["lr"] for group in groups if group["params"]}
    if sizes != [len(shapes)] and (sizes != [len(matrices), len(vectors)] or len(rates) > 1):
        raise ValueError(
            f"optimizer_state: groups of {', '.join(map(str, sizes))} parameters without names, expected param_names "
            "(an optimizer made with model.named_parameters()), or one group, or weights before biases and norms at "
            "one learning rate: which parameter is which cannot be told"
        )
    warnings.warn(
        "optimizer_state: has no names, so its parameters are taken to be in the policy's order; among those of one "
        "shape another order would not be noticed. An optimizer made with model.named_parameters() saves the names",
        stacklevel=4,
    )
    return list(shapes) if len(sizes) == 1 else matrices + vectors


def _rates(groups: list[Mapping], step_size: float) -> list[float]:
    """The learning rate of each group in units of the step size: 1 where all are one rate, whatever it is by now."""
    lr = [group["lr"] for group in groups]
    if not any(lr):  # a scheduler's end
        low, high = SETTINGS["lr"]
        lr = [_number(group.get("initial_lr", 1.0), low, high, "optimizer_state: initial_lr") for group in groups]
    used = [rate for rate, group in zip(lr, groups, strict=True) if group["params"]]
    if not used or max(used) - min(used) <= SAME_RATE * max(used):
        return [1.0] * len(groups)
    if not any(abs(rate - step_size) <= SAME_RATE * rate for rate in used):
        raise ValueError(
            f"step_size: {step_size:g}, and the groups of optimizer_state have learning rates "
            f"{', '.join(f'{rate:g}' for rate in sorted(set(used)))}; expected one of these, the η that stands for the "
            "whole step"
        )
    return [rate / step_size for rate in lr]


def _adam(group: Mapping, rate: float, entry, shape: Sequence[int], where: str) -> AdamW:
    settings = {name: group[name] for name in ("betas", "eps", "weight_decay", "amsgrad", "coupled")} | {"rate": rate}
    if entry is None:
        return AdamW(**settings)
    moments = _tensors(entry, (*MOMENTS, LARGEST) if group["amsgrad"] else MOMENTS, {"step", LARGEST}, shape, where)
    for name, moment in moments.items():
        if name != "exp_avg" and (moment < 0).any():
            raise ValueError(f"{where}: {name} has values that no AdamW leaves, expected finite ones (squares from 0)")
    return AdamW(**settings, steps=_steps(entry, where), moments=moments)


def _sgd(group: Mapping, rate: float, entry, shape: Sequence[int], where: str) -> SGD:
    settings = {name: group[name] for name in ("momentum", "dampening", "nesterov", "weight_decay")} | {"rate": rate}
    if entry is None or not group["momentum"]:
        return SGD(**settings)
    return SGD(**settings, buffer=_tensors(entry, (BUFFER,), set(), shape, where)[BUFFER])


def _tensors(entry, wanted: Sequence[str], more: set[str], shape: Sequence[int], where: str) -> dict[str, Tensor]:
    """The tensors `wanted` of a parameter's entry, which may have `more`; ValueError for what no such entry has."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: {type(entry).__name__}, expected moments by name")
    strange = sorted(set(map(str, entry)) - {*wanted, *more})
    missing = [name for name in wanted if not isinstance(entry.get(name), Tensor)]
    if strange or missing:
        has = f"{some(strange)} in its state" if strange else f"no tensor {some(missing)} in its state"
        raise ValueError(f"{where}: another optimizer's, with {has}; {EXPECTED}")
    for name in wanted:
        moment = entry[name]
        if type(moment) not in (Tensor, torch.nn.Parameter) or moment.layout != torch.strided:
            raise ValueError(f"{where}: {name} is a {type(moment).__name__} in parts, expected the whole tensor")
        if not moment.is_floating_point():
            raise ValueError(f"{where}: {name} is {moment.dtype}, expected floating numbers")
        if tuple(moment.shape) != tuple(shape):
            raise ValueError(
                f"{where}: {name} has shape {tuple(moment.shape)}, expected {tuple(shape)}; the state must be an "
                "optimizer's over this policy's parameters, in their order where it has no names"
            )
        if not torch.isfinite(moment).all():
            raise ValueError(f"{where}: {name} has values that no AdamW leaves, expected finite ones (squares from 0)")
    return {name: entry[name].detach() for name in wanted}


def _steps(entry: Mapping, where: str) -> int:
    if "step" not in entry:
        raise ValueError(f"{where}: no step in its state (apex keeps it in the group), {EXPECTED}")
    steps = _number(entry["step"], *STEPS, f"{where}: step")
    if steps != int(steps):
        raise ValueError(f"{where}: step: {steps}, expected a whole number")
    return int(steps)


def _number(value, low: float, high: float, where: str) -> float:
    """The number, or that in a tensor of one; ValueError where it is not from `low` to below `high`."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.layout == torch.strided:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value < high:
        said = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.40}"
        raise ValueError(f"{where}: {said}, expected a number from {low:g} to below {high:g}; {EXPECTED}")
    return float(value)
