"""Directions in weight space: v in θ(η) = θ + η·v, by parameter name.

η is counted in the direction's own units: v = (after − before)/step_size, so η = step_size is the update itself.
"""

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from dentropy.doors import regular_file, third_party
from dentropy.model.binding import Binding, on_host
from dentropy.model.difference import difference, warn_if_rounded_away
from dentropy.model.in_parts import read_in_parts
from dentropy.model.optimizer_step import learning_rate, own_parameters, stepped_copies
from dentropy.model.shards import dot, is_shard, whole
from dentropy.shown import count, line


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
        self.step_size = checked_step_size(step_size)
        for name, v in self.tensors.items():
            if not v.is_floating_point() or v.dtype.itemsize < 2:
                raise ValueError(f"direction: {name} is {v.dtype}, expected a floating dtype of 16 bits or more")
        for name, finite in on_host({name: torch.isfinite(v).all() for name, v in self.tensors.items()}).items():
            if not finite:
                raise ValueError(f"direction: {name} has values that are not finite, expected finite ones")
        if not any(whole(v.any()) for v in self.tensors.values()):
            raise ValueError(
                f"direction: all {len(self.tensors)} tensors are zero, expected an update that moves something"
            )

    def __repr__(self) -> str:
        size = count(sum(v.numel() for v in self.tensors.values()), "weight")
        return line(self, f"{size} in {count(len(self.tensors), 'tensor')}", f"step_size {self.step_size:g}")

    def norm(self) -> float:
        """‖v‖, the Euclidean norm over all tensors."""
        return sum(dot(v, v) for v in self.tensors.values()) ** 0.5

    @classmethod
    def between(
        cls, before, after, step_size: float, *, trust_remote_code: bool = False, shard: bool = False
    ) -> "Direction":
        """(after − before)/step_size.

        Warns where both are half precision and most of the difference is zero: in bf16 an update below 1/256 of a
        weight vanishes, and with it most of a small learning rate's step.

        Args:
            before, after: a model, a state dict, or a checkpoint folder (loaded by transformers, in the dtype it was
                saved in). Both must name the same tensors, of the same shapes; an alias of a tied tensor may be
                missing on one side. Of two adapter folders of one base model the files are compared, each tensor in
                its own dtype. An adapter folder after a base model is what merging it would add to the base weights.
            step_size: the η at which `before` becomes `after`.
            trust_remote_code: run the code in a checkpoint folder.
            shard: load checkpoint folders over the ranks of the process group, all of which call this, as
                `Policy.from_pretrained` does: v is in parts as its parameters are.

        Raises:
            ValueError: for tensors that are missing or differ in shape, for buffers that differ (a router's bias, say:
                a direction moves parameters alone), for adapters that differ in more than their tensors, and where
                nothing differs. Constants such as rotary frequencies may be missing.

        Example:
            >>> before, after = {"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([1.5, 2.0])}
            >>> Direction.between(before, after, step_size=0.25).tensors
            {'weight': tensor([2., 0.])}
        """
        step_size = checked_step_size(step_size)
        differs = difference(before, after, trust_remote_code, shard)
        if not differs:
            raise ValueError("after: equal to before in every tensor, expected an update that moves something")
        for x in differs.values():
            x /= step_size
        return cls(differs, step_size)

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
        parameters = own_parameters(model, optimizer)
        step_size = learning_rate(optimizer) if step_size is None else checked_step_size(step_size)
        stepped = stepped_copies(optimizer)
        before = {name: p.detach() for name, p in parameters.items()}
        after = {name: stepped[id(p)] for name, p in parameters.items()}
        warn_if_rounded_away(before, after, [name for name, p in parameters.items() if p.grad is not None])
        tensors = {name: (after[name] - x) / step_size for name, x in before.items()}
        return cls({name: v for name, v in tensors.items() if v.any()} or tensors, step_size)

    @classmethod
    def load(cls, path, model: nn.Module | None = None) -> "Direction":
        """The direction in a safetensors file: one tensor per parameter name, step_size in its metadata (else 1.0).

        Args:
            path: the file.
            model: under FSDP2 or tensor parallel: then each rank reads no more than its part of every tensor, and holds
                that. All ranks call this.

        Raises:
            ValueError: naming the file, for one that is not there or holds no direction.
        """
        from safetensors import safe_open

        path = regular_file(path, "a safetensors file", "direction")
        failed = f"direction: {path}: not a safetensors file"
        with third_party(failed, "a tensor for each parameter"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if model is None:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            else:
                tensors = read_in_parts(file, model)
        with third_party(f"direction: {path}: step_size {metadata.get('step_size')!r:.40} in its metadata", "a number"):
            step_size = float(metadata.get("step_size", 1.0))
        try:
            return cls(tensors, step_size)
        except ValueError as error:
            raise ValueError(f"direction: {path}: {error}") from error

    def save(self, path) -> None:
        """Writes what `load` reads. ValueError where ranks hold it in parts."""
        from safetensors.torch import save_file

        if any(map(is_shard, self.tensors.values())):
            raise ValueError("direction: ranks hold it in parts, expected whole tensors to save")
        # copies: aliases of a tied tensor share memory, which the format refuses
        tensors = {name: v.cpu().clone(memory_format=torch.contiguous_format) for name, v in self.tensors.items()}
        save_file(tensors, path, metadata={"step_size": repr(self.step_size)})

    def on(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, v) for every parameter of `model` that moves, v in the parameter's dtype and on its device.

        Names are matched strictly, but for what wrappers and PEFT put into them (`base_model.model.`, the adapter's
        name). Several names of one tied parameter count once where their tensors are equal.

        Raises:
            ValueError: for unknown names, shapes that differ, unequal tensors for one parameter, and values that the
                parameter's dtype cannot hold.
        """
        return Binding(model).pairs(self)


def checked_step_size(step_size) -> float:
    """It, as a float; ValueError where it is not a positive number."""
    if not isinstance(step_size, Real) or not 0 < step_size < float("inf"):
        raise ValueError(f"step_size: {step_size!r}, expected a positive number")
    return float(step_size)
