"""The step an optimizer would take, taken by a copy of it."""

import copy
import inspect
import warnings

import torch
from torch import Tensor, nn


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    if len(rates) > 1:
        raise ValueError(
            f"step_size: not given, and the parameter groups differ in learning rate ({rates}); "
            "expected the η that stands for the whole step"
        )
    if rates[0] <= 0:
        raise ValueError(
            f"optimizer: its learning rate is {rates[0]} (warm-up?), expected a positive one or a step_size"
        )
    return rates[0]


def refuse_unforeseeable(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__}.step needs a closure, expected an optimizer whose "
            "step() follows from the gradients alone"
        )
    if getattr(optimizer, "_optimizer_step_pre_hooks", None):
        raise ValueError(
            "optimizer: it has step pre-hooks, which may change gradients, expected none: do what they do (clipping, "
            "say) before, and remove them"
        )


def own_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Name -> parameter, for those of the optimizer that are the model's; a warning for those that are not.

    Raises:
        ValueError: for an optimizer whose step cannot be foreseen, and where no parameter has a gradient or belongs to
            the model.
    """
    refuse_unforeseeable(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.grad is None for p in parameters):
        raise ValueError("optimizer: none of its parameters has a gradient, expected loss.backward() before")
    names = {id(p): name for name, p in model.named_parameters()}
    own = {names[id(p)]: p for p in parameters if id(p) in names}
    if not own:
        raise ValueError(
            "optimizer: none of its parameters belongs to the model, expected one built on model.parameters()"
        )
    if strangers := len(parameters) - len(own):
        warnings.warn(f"optimizer: {strangers} of its parameters are not the model's and are left out", stacklevel=3)
    return own


def stepped_copies(optimizer: torch.optim.Optimizer, *, in_float32: bool = False) -> dict[int, Tensor]:
    """id of each parameter -> its value after one step, taken by a deep copy of the optimizer.

    The whole __dict__ is copied, not what pickling keeps, since optimizers outside PyTorch hold settings of their own
    there. Not copied: a `step` that a learning-rate scheduler put on the instance, which is bound to the original,
    and the instance's hooks, whose side effects belong to real steps.

    in_float32: weights, gradients and state of half precision are copied to float32: the step that is meant, before
    anything of it is rounded.
    """
    copied = _in_float32 if in_float32 else Tensor.clone
    memo: dict[int, object] = {}
    copies: dict[int, Tensor] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        twin = nn.Parameter(copied(parameter.detach()), requires_grad=parameter.requires_grad)
        twin.grad = None if parameter.grad is None else copied(parameter.grad.detach())
        memo[id(parameter)] = copies[id(parameter)] = twin
        memo |= {id(x): copied(x) for x in optimizer.state.get(parameter, {}).values() if isinstance(x, Tensor)}
    twin_optimizer = object.__new__(type(optimizer))
    hooks = {name for name in vars(optimizer) if name.startswith("_optimizer_") and name.endswith("_hooks")}
    for name, value in vars(optimizer).items():
        if name != "step":
            vars(twin_optimizer)[name] = type(value)() if name in hooks else copy.deepcopy(value, memo)
    with torch.no_grad():
        twin_optimizer.step()
    return {key: twin.detach() for key, twin in copies.items()}


def _in_float32(x: Tensor) -> Tensor:
    half = x.is_floating_point() and x.dtype.itemsize < 4
    return x.to(torch.float32) if half else x.clone()
