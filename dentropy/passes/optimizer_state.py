"""The form of a saved AdamW state: what a file must hold before any of it is used."""

from numbers import Real

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
ALL_MOMENTS = (*MOMENTS, "max_exp_avg_sq")  # the last with amsgrad
# name -> (lowest, highest, whether the highest itself is allowed)
SETTINGS = {"eps": (0.0, 1.0, True), "weight_decay": (0.0, float("inf"), False)}
FLAGS = ("amsgrad", "maximize")
# How a step is computed, not which: as suits the parameters here.
IMPLEMENTATION = {"capturable": False, "differentiable": False, "foreach": None, "fused": None}


def check_state(state) -> None:
    """ValueError naming the entry of an optimizer's state_dict() that is missing or that AdamW cannot have."""
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        raise ValueError("optimizer_state: no 'state' in it, expected the state_dict() of an AdamW")
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups) or not groups:
        raise ValueError("optimizer_state: no list of 'param_groups' in it, expected the state_dict() of an AdamW")
    for index, group in enumerate(groups):
        _check_group(group, f"optimizer_state: param_groups[{index}]")
    moments = ALL_MOMENTS if any(group["amsgrad"] for group in groups) else MOMENTS
    for key, entry in state["state"].items():
        _check_entry(entry, moments, f"optimizer_state: state[{key!r:.40}]")


def _check_group(group: dict, where: str) -> None:
    parameters = group.get("params")
    if not isinstance(parameters, list) or not all(isinstance(key, (int, str)) for key in parameters):
        raise ValueError(f"{where}: params: {parameters!r:.40}, expected a list of the parameters' numbers or names")
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(_in(b, 0.0, 1.0, False) for b in betas):
        raise ValueError(f"{where}: betas: {betas!r:.40}, expected two numbers from 0 to below 1")
    for name, bounds in SETTINGS.items():
        if not _in(group.get(name), *bounds):
            raise ValueError(f"{where}: {name}: {group.get(name)!r:.40}, expected a number from 0 to {bounds[1]:g}")
    for name in FLAGS:
        if not isinstance(group.get(name), bool):
            raise ValueError(f"{where}: {name}: {group.get(name)!r:.40}, expected True or False")


def _check_entry(entry, moments: tuple[str, ...], where: str) -> None:
    """Entry of a parameter: its moments and the number of steps behind them."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {type(entry).__name__}, expected moments by name")
    for name in moments if entry else ():
        moment = entry.get(name)
        if not isinstance(moment, Tensor) or not moment.is_floating_point() or moment.layout != torch.strided:
            raise ValueError(f"{where}: {name}: {_kind(moment)}, expected a tensor of floating numbers")
        if not torch.isfinite(moment).all() or (name != "exp_avg" and (moment < 0).any()):
            raise ValueError(f"{where}: {name} has values that no AdamW leaves, expected finite ones (squares from 0)")
    step = entry.get("step")
    if isinstance(step, Tensor) and step.numel() == 1 and step.layout == torch.strided:
        step = step.item()
    if entry and not _in(step, 1, 2**63, False):
        raise ValueError(f"{where}: step: {_kind(step)}, expected a number from 1")


def _in(value, low: float, high: float, closed: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return low <= value < high or (closed and value == high)


def _kind(value) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"{value!r:.40}"
