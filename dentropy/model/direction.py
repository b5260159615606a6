"""Directions in weight space: v in θ(η) = θ + η·v, by parameter name.

η is counted in the direction's own units: v = (after − before)/step_size, so η = step_size is the update itself.
"""

import copy
import inspect
import warnings
import weakref
from collections.abc import Mapping
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from dentropy.doors import regular_file, third_party
from dentropy.model.checkpoint import load_checkpoint

# A difference of two bf16 checkpoints with more zeros than this has lost most of the update to rounding.
MOSTLY_ZERO = 0.5


class Direction:
    """v, a tensor per parameter name; parameters left out do not move. Not to be changed once made.

    Names and shapes are held against a model when the direction is used with it.

    Args:
        tensors: name -> floating tensor of the parameter's shape.
        step_size: the η at which the update was, or would be, taken (for an optimizer step its learning rate).

    Raises:
        ValueError: where a tensor is not floating or not finite, where all are zero, or the step size is not a
            positive number.

    Example:
        >>> v = Direction({"lm_head.weight": torch.ones(4, 2)}, step_size=1e-6)
        >>> v.norm()
        2.8284271247461903
    """

    def __init__(self, tensors: Mapping[str, Tensor], step_size: float = 1.0):
        if not tensors:
            raise ValueError("direction: no tensors, expected at least one parameter name with its v")
        self.tensors = {name: v.detach() for name, v in tensors.items()}
        self.step_size = _step_size(step_size)
        for name, v in self.tensors.items():
            if not v.is_floating_point() or v.dtype.itemsize < 2:
                raise ValueError(f"direction: {name} is {v.dtype}, expected a floating dtype of 16 bits or more")
        for name, finite in _on_host({name: torch.isfinite(v).all() for name, v in self.tensors.items()}).items():
            if not finite:
                raise ValueError(f"direction: {name} has values that are not finite, expected finite ones")
        if not any(v.any() for v in self.tensors.values()):
            raise ValueError(
                f"direction: all {len(self.tensors)} tensors are zero, expected an update that moves something"
            )

    def norm(self) -> float:
        """‖v‖, the Euclidean norm over all tensors."""
        return float(sum(v.double().square().sum() for v in self.tensors.values()) ** 0.5)

    @classmethod
    def between(cls, before, after, step_size: float, *, trust_remote_code: bool = False) -> "Direction":
        """(after − before)/step_size.

        Warns where both are half precision and most of the difference is zero: in bf16 an update below 1/256 of a
        weight vanishes, and with it most of a small learning rate's step.

        Args:
            before, after: a model, a state dict, or a checkpoint folder (loaded by transformers, in the dtype it was
                saved in). Both must name the same tensors, of the same shapes; an alias of a tied tensor may be
                missing on one side.
            step_size: the η at which `before` becomes `after`.
            trust_remote_code: run the code in a checkpoint folder.

        Raises:
            ValueError: for tensors that are missing or differ in shape, and where nothing differs.

        Example:
            >>> before, after = {"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([1.5, 2.0])}
            >>> Direction.between(before, after, step_size=0.25).tensors
            {'weight': tensor([2., 0.])}
        """
        step_size = _step_size(step_size)
        before, after = (
            _tensors(side, argument, trust_remote_code) for side, argument in ((before, "before"), (after, "after"))
        )
        names = _common_names(before, after)
        for name in names:
            if before[name].shape != after[name].shape:
                raise ValueError(
                    f"after: {name} has shape {tuple(after[name].shape)}, "
                    f"expected that of before, {tuple(before[name].shape)}"
                )
        _warn_if_rounded_away(before, after, names)
        work = {
            name: torch.promote_types(torch.promote_types(before[name].dtype, after[name].dtype), torch.float32)
            for name in names
        }
        difference = {
            name: (after[name].to(before[name].device, work[name]) - before[name].to(work[name])) / step_size
            for name in names
            if not torch.equal(after[name].to(before[name].device), before[name])
        }
        if not difference:
            raise ValueError("after: equal to before in every tensor, expected an update that moves something")
        return cls(difference, step_size)

    @classmethod
    def from_optimizer_step(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, step_size: float | None = None
    ) -> "Direction":
        """What `optimizer.step()` would do with the gradients that are there, divided by step_size.

        The step is taken by a copy of the optimizer on copies of the parameters, so model and optimizer stay as they
        are, bit for bit. It is the step as it would be rounded in the parameters' dtype: at a learning rate of 1e-6 in
        float32 that is some 1% of noise in v; warns where half precision rounds most of it away.

        Args:
            model: the model whose parameters v is of.
            optimizer: built on them. Those of its parameters that are not the model's (a value head, say) are left
                out, with a warning.
            step_size: by default the learning rate; to be given where parameter groups differ in it.

        Raises:
            ValueError: for optimizers whose step needs a closure (LBFGS) or is prepared by step hooks, and where no
                parameter has a gradient.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            >>> model(torch.ones(2, 3)).sum().backward()
            >>> direction = Direction.from_optimizer_step(model, optimizer)
            >>> round(direction.tensors["bias"].item(), 3), direction.step_size
            (-2.0, 0.5)
        """
        _refuse_unforeseeable(optimizer)
        step_size = _learning_rate(optimizer) if step_size is None else _step_size(step_size)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in parameters):
            raise ValueError("optimizer: none of its parameters has a gradient, expected loss.backward() before")
        names = {id(p): name for name, p in model.named_parameters()}
        strangers = sum(id(p) not in names for p in parameters)
        if strangers == len(parameters):
            raise ValueError(
                "optimizer: none of its parameters belongs to the model, expected one built on model.parameters()"
            )
        if strangers:
            warnings.warn(
                f"optimizer: {strangers} of its parameters are not the model's and are left out", stacklevel=2
            )
        stepped = _stepped_copies(optimizer)
        before = {names[id(p)]: p.detach() for p in parameters if id(p) in names and p.grad is not None}
        after = {names[id(p)]: stepped[id(p)] for p in parameters if id(p) in names and p.grad is not None}
        _warn_if_rounded_away(before, after, list(before))
        tensors = {names[id(p)]: (stepped[id(p)] - p.detach()) / step_size for p in parameters if id(p) in names}
        return cls({name: v for name, v in tensors.items() if v.any()} or tensors, step_size)

    @classmethod
    def load(cls, path) -> "Direction":
        """The direction in a safetensors file: one tensor per parameter name, step_size in its metadata (else 1.0).

        Raises:
            ValueError: naming the file, for one that is not there or holds no direction.
        """
        from safetensors import safe_open

        path = regular_file(path, "a safetensors file", "direction")
        failed = f"direction: {path}: not a safetensors file"
        with third_party(failed, "a tensor for each parameter"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        with third_party(f"direction: {path}: step_size {metadata.get('step_size')!r:.40} in its metadata", "a number"):
            step_size = float(metadata.get("step_size", 1.0))
        try:
            return cls(tensors, step_size)
        except ValueError as error:
            raise ValueError(f"direction: {path}: {error}") from error

    def save(self, path) -> None:
        """Writes what `load` reads."""
        from safetensors.torch import save_file

        # copies: aliases of a tied tensor share memory, which the format refuses
        tensors = {name: v.cpu().clone(memory_format=torch.contiguous_format) for name, v in self.tensors.items()}
        save_file(tensors, path, metadata={"step_size": repr(self.step_size)})

    def on(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, v) for every parameter of `model` that moves, v in the parameter's dtype and on its device.

        Names are matched strictly. Several names of one tied parameter count once where their tensors are equal.

        Raises:
            ValueError: for unknown names, shapes that differ, unequal tensors for one parameter, and values that the
                parameter's dtype cannot hold.
        """
        return Binding(model).pairs(self)

    def _checked(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Name of each parameter that moves (the last of a tied one's) -> v, still as it is; ValueError as `on`."""
        unknown = [name for name in self.tensors if name not in parameters]
        if unknown:
            raise ValueError(
                f"direction: {len(unknown)} of {len(self.tensors)} names are not the policy's "
                f"({_some(unknown)}), expected names such as {_some(list(parameters))}"
            )
        moving: dict[int, str] = {}
        for name, v in self.tensors.items():
            parameter = parameters[name]
            if v.shape != parameter.shape:
                raise ValueError(
                    f"direction: {name} has shape {tuple(v.shape)}, expected the policy's {tuple(parameter.shape)}"
                )
            other = moving.get(id(parameter))
            if other is not None and not torch.equal(self.tensors[other], v):
                raise ValueError(
                    f"direction: {other} and {name} are one tied parameter of the policy, expected equal tensors"
                )
            moving[id(parameter)] = name
        return {name: self.tensors[name] for name in moving.values()}


class Binding:
    """A model and the direction last used with it: its tensors as tangents of the parameters, checked and copied to
    their dtype and device once, not at every pass.

    There is one such copy for a model, and it goes with its Direction. It is made anew where parameters are no longer
    of the shape, dtype and device they were, or tied as they were.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._direction, self._tangents, self._form = None, {}, None

    def pairs(self, direction: Direction) -> list[tuple[nn.Parameter, Tensor]]:
        """As `Direction.on` says."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        form = _form(direction, parameters)
        if self._direction is None or self._direction() is not direction or form != self._form:
            self._bind(direction, parameters, form)
        return [(parameters[name], v) for name, v in self._tangents.items()]

    def _bind(self, direction: Direction, parameters: dict[str, nn.Parameter], form) -> None:
        self._direction, self._tangents = None, {}  # before there is another copy
        with torch.inference_mode(False):  # a pass in it would leave tensors that later ones could not use
            tangents = _cast(direction._checked(parameters), parameters)
        # Only the dictionary is held by what runs when the Direction is gone.
        self._direction = weakref.ref(direction, lambda _: tangents.clear())
        self._tangents, self._form = tangents, form


def _form(direction: Direction, parameters: dict[str, nn.Parameter]) -> list[tuple]:
    """What a binding depends on, of every parameter that is named: shape, dtype, device, and which are tied."""
    first: dict[int, int] = {}
    named = [parameters.get(name) for name in direction.tensors]
    return [
        (None if p is None else (p.shape, p.dtype, p.device), first.setdefault(id(p), i)) for i, p in enumerate(named)
    ]


def _cast(moving: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Each v as the parameter's tangent; ValueError where its dtype cannot hold v."""
    cast = {name: v.to(parameters[name].device, parameters[name].dtype) for name, v in moving.items()}
    changed = [name for name, v in moving.items() if cast[name].dtype != v.dtype]  # the others were checked before
    moves = _on_host({name: moving[name].any() for name in changed})
    holds = _on_host({name: torch.isfinite(cast[name]).all() & cast[name].any() for name in changed if moves[name]})
    for name, held in holds.items():
        if not held:
            v = moving[name]
            raise ValueError(
                f"direction: {name} reaches from {v[v != 0].abs().min():.1e} to {v.abs().max():.1e}, which "
                f"{cast[name].dtype} cannot hold, expected a scaled direction or a policy loaded in float32"
            )
    return cast


def _on_host(flags: dict[str, Tensor]) -> dict[str, bool]:
    """Scalars on any devices, read in one copy from each."""
    found = {}
    for device in {flag.device for flag in flags.values()}:
        names = [name for name, flag in flags.items() if flag.device == device]
        found |= zip(names, torch.stack([flags[name] for name in names]).tolist(), strict=True)
    return {name: found[name] for name in flags}


def _step_size(step_size) -> float:
    if not isinstance(step_size, Real) or not 0 < step_size < float("inf"):
        raise ValueError(f"step_size: {step_size!r}, expected a positive number")
    return float(step_size)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _tensors(side, argument: str, trust_remote_code: bool = False) -> dict[str, Tensor]:
    """Name -> tensor of a model, a state dict or a checkpoint folder."""
    if isinstance(side, nn.Module):
        return {name: p.detach() for name, p in side.named_parameters(remove_duplicate=False)}
    if isinstance(side, Mapping):
        return {name: x.detach() for name, x in side.items() if isinstance(x, Tensor)}
    if not Path(side).is_dir():
        raise ValueError(f"{argument}: {side}: no such folder, expected a model, a state dict or a checkpoint folder")
    return _tensors(load_checkpoint(side, argument, "auto", trust_remote_code=trust_remote_code), argument)


def _common_names(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names on both sides; a name on one side alone must be an alias of a tensor that both have."""
    common = [name for name in before if name in after]
    for side, tensors, other in (("after", before, after), ("before", after, before)):
        missing = [
            name
            for name in tensors
            if name not in other and not any(_is_alias(tensors[name], tensors[c]) for c in common)
        ]
        if missing:
            raise ValueError(
                f"{side}: {len(missing)} tensors are missing ({_some(missing)}), expected the same names on both sides"
            )
    return common


def _is_alias(x: Tensor, y: Tensor) -> bool:
    """Equal by value, as tied weights are in a state dict; constant tensors (norms, biases) are equal by accident."""
    return x.shape == y.shape and torch.equal(x, y) and bool((x != x.flatten()[0]).any())


def _warn_if_rounded_away(before: dict[str, Tensor], after: dict[str, Tensor], names: list[str]) -> None:
    half = [
        n
        for n in names
        if before[n].is_floating_point() and before[n].dtype.itemsize == 2 and after[n].dtype.itemsize == 2
    ]
    total = sum(before[n].numel() for n in half)
    equal = sum(int((before[n] == after[n].to(before[n].device)).sum()) for n in half)
    if total and equal / total > MOSTLY_ZERO and equal < total:
        warnings.warn(
            f"after: {equal / total:.0%} of the half-precision weights are equal to before; updates below "
            "1/256 of a weight vanish in bf16. Compare float32 (master) weights to see the whole update",
            stacklevel=3,
        )


def _learning_rate(optimizer: torch.optim.Optimizer) -> float:
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


def _refuse_unforeseeable(optimizer: torch.optim.Optimizer) -> None:
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


def _stepped_copies(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """id of each parameter -> its value after one step, taken by a deep copy of the optimizer.

    The whole __dict__ is copied, not what pickling keeps, since optimizers outside PyTorch hold settings of their own
    there. Not copied: a `step` that a learning-rate scheduler put on the instance, which is bound to the original,
    and the instance's hooks, whose side effects belong to real steps.
    """
    memo: dict[int, object] = {}
    copies: dict[int, Tensor] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        twin = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        twin.grad = None if parameter.grad is None else parameter.grad.detach().clone()
        memo[id(parameter)] = copies[id(parameter)] = twin
    twin_optimizer = object.__new__(type(optimizer))
    hooks = {name for name in vars(optimizer) if name.startswith("_optimizer_") and name.endswith("_hooks")}
    for name, value in vars(optimizer).items():
        if name != "step":
            vars(twin_optimizer)[name] = type(value)() if name in hooks else copy.deepcopy(value, memo)
    with torch.no_grad():
        twin_optimizer.step()
    return {key: twin.detach() for key, twin in copies.items()}
