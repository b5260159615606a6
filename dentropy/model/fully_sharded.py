"""A model whose parameters FSDP2 (`fully_shard`) spreads over ranks, for the time of a pass.

FSDP gathers a module's parameters before its forward and frees them behind it. In between, tensors of the pass stand in
their places: θ + η·v, dual ones where derivatives are asked for, made there and then from the gathered parameter and
from v, which is in parts as the parameter is. So no rank ever has more than one module's worth of whole tensors.

What the root holds (the embedding, the last norm, the head) FSDP gathers for a forward of the root alone, and a pass to
hidden states never calls that. Those are gathered here, module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dentropy.model.in_place import TURN
from dentropy.model.shards import is_shard, whole

Make = Callable[[Tensor], Tensor]


class FullySharded:
    """The places of a model's parameters, and what stands in them while their modules run."""

    in_unison = False

    def __init__(self, model: nn.Module, root: nn.Module):
        self._root = root
        self._units = _units(root)
        self._instead: list[dict[tuple[int, str], Make]] = []  # the first is made first
        self._found: dict[int, list] = {}
        self._modules, self._fsdp_modules = list(model.modules()), _fsdp_modules(root)
        self._inside = 0

    @classmethod
    def of(cls, model: nn.Module, shards: Mapping[str, Tensor]) -> FullySharded:
        """Of a model with parameters that are in parts; ValueError, by name, for what cannot be handled."""
        roots = _roots(model)
        _check(model, roots, shards)
        return cls(model, roots[0])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, what `instead` makes stands in the parameters' places while their modules run; on the way in and out
        all is as FSDP has it between steps."""
        with TURN:
            self.rest()
            handles = []
            try:
                self._inside += 1
                for module, owners in self._units if self._inside == 1 else []:
                    handles.append(module.register_forward_pre_hook(self._entering(owners)))
                    handles.append(module.register_forward_hook(self._leaving, prepend=True, always_call=True))
                yield
            finally:
                self._inside -= 1
                for handle in handles:
                    handle.remove()
                for key in list(self._found):
                    self._put_back(key)
                self.rest()

    @contextmanager
    def instead(self, makes: Mapping[int, Make]) -> Iterator[None]:
        """Inside, make(x) stands for each parameter by its id(), x being what would stand there without: the whole
        parameter, or what an `instead` around this one makes of it."""
        with self.running():
            standing = [(id(m), name, id(p)) for m in self._modules for name, p in m._parameters.items()]
            if makes.keys() - {place[2] for place in standing}:
                raise RuntimeError("some parameters to stand in for are not the model's sharded ones")
            places = {(module, name): makes[p] for module, name, p in standing if p in makes}
            self._instead.append(places)
            try:
                yield
            finally:
                self._instead.remove(places)

    def running_its_own(self):
        """Inside, the model's own forward runs: the same, without what stands instead."""
        return self.running()

    def head(self, module: nn.Module) -> tuple[Tensor, Tensor | None, None]:
        """Weight and bias of the head, which is read and not run, as they stand, or would."""
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        return self._made(module, "weight", weight), None if bias is None else self._made(module, "bias", bias), None

    def as_it_stands(self, v: Tensor) -> Tensor:
        """v in the form of the parameters that stand in a pass."""
        return whole(v)

    def rest(self) -> None:
        """Every parameter is its shard again, and FSDP knows of no forward that is under way. A pass may have run only
        a part of a group ([norm, head]), or failed."""
        if self._root._get_fsdp_state()._is_root:  # it has run once
            self._root.reset_iter_state()
        for module in self._fsdp_modules:
            module.reshard()

    def _entering(self, owners: list[nn.Module]):
        def enter(module, _) -> None:
            if id(module) in self._found:
                return
            places = [(m, name, p) for m in owners for name, p in m._parameters.items() if p is not None]
            self._found[id(module)] = [(m._parameters, name, p) for m, name, p in places]
            made: dict[int, Tensor] = {}
            for owner, name, p in places:
                if id(p) not in made:
                    made[id(p)] = self._made(owner, name, p)
                owner._parameters[name] = made[id(p)]

        return enter

    def _leaving(self, module: nn.Module, *_) -> None:
        self._put_back(id(module))

    def _put_back(self, key: int) -> None:
        for parameters, name, p in self._found.pop(key, ()):
            parameters[name] = p

    def _made(self, owner: nn.Module, name: str, p: Tensor) -> Tensor:
        x = _with_gradient(p) if torch.is_grad_enabled() else whole(p.detach())
        for makes in self._instead:
            make = makes.get((id(owner), name))
            x = x if make is None else make(x.detach())
        return x


def is_linear(module: nn.Module) -> bool:
    """Whether it is a plain nn.Linear, also where `fully_shard` has made its class one of FSDP's."""
    return type(module) is nn.Linear or (_is_fsdp(module) and nn.Linear in type(module).__bases__)


def _with_gradient(p: Tensor) -> Tensor:
    """The whole parameter, differentiable: each rank gets its part of the mean over ranks of their gradients, as FSDP
    gives it, so that a tied weight may take both ways."""
    if not is_shard(p):
        return p
    from torch.distributed.tensor import Partial

    full = p.full_tensor(grad_placements=[Partial()] * p.device_mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda g: g / dist.get_world_size())
    return full


def _is_fsdp(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _fsdp_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_fsdp(module)]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether some of it is under `fully_shard`."""
    return bool(_roots(model))


def _roots(model: nn.Module) -> list[nn.Module]:
    """The modules under `fully_shard` that are in no other."""
    if _is_fsdp(model):
        return [model]
    return [root for child in model.children() for root in _roots(child)]


def _units(root: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """(a module, those whose parameters are whole, or made so, while it runs): every FSDP module below the root with
    what it holds, and each module with parameters that the root holds by itself."""
    found: list[tuple[nn.Module, list[nn.Module]]] = []

    def visit(module: nn.Module, held: list[nn.Module] | None) -> None:
        if module is not root and _is_fsdp(module):
            held = []
            found.append((module, held))
        if held is None:
            found.append((module, [module]))
        else:
            held.append(module)
        for child in module.children():
            visit(child, held)

    visit(root, None)
    owning = [(m, [o for o in owners if any(p is not None for p in o._parameters.values())]) for m, owners in found]
    return [(module, owners) for module, owners in owning if owners]


def _check(model: nn.Module, roots: list[nn.Module], shards: Mapping[str, Tensor]) -> None:
    """ValueError for forms of FSDP2 in which a pass would be wrong, or was never seen to be right."""
    outside = [name for name, p in model.named_parameters() if not is_shard(p)]
    if len(roots) > 1 or outside:
        raise ValueError(
            f"model: {outside[0] if outside else 'the model itself'} is under no fully_shard, and other parts are, "
            "expected fully_shard(model) around all of them (between steps, not between forward and backward)"
        )
    for name, p in shards.items():
        if p.device_mesh.ndim > 1 or p.device_mesh.size() != dist.get_world_size():
            raise ValueError(
                f"model: {name} is on a mesh of {tuple(p.device_mesh.shape)} ranks (HSDP, or tensor parallel beside "
                f"FSDP2), expected one dimension with all {dist.get_world_size()} ranks"
            )
    if not hasattr(roots[0], "reset_iter_state"):
        raise ValueError(f"model: sharded by PyTorch {torch.__version__}, expected 2.13 or newer for sharded weights")
    dtypes = {p.dtype for p in shards.values()}
    for module in _fsdp_modules(model):
        state = module._get_fsdp_state()
        mixed = state._mp_policy
        if {mixed.param_dtype, mixed.reduce_dtype, mixed.output_dtype} - dtypes - {None} or (
            mixed.param_dtype is not None and len(dtypes) > 1
        ):
            raise ValueError(
                f"model: sharded with {mixed}, in whose products small changes of the weights are lost, expected "
                "fully_shard without mp_policy"
            )
        for group in state._fsdp_param_groups:
            if type(group.offload_policy).__name__ == "CPUOffloadPolicy":
                raise ValueError("model: sharded with CPUOffloadPolicy, expected fully_shard without offload_policy")
            if group.gradient_divide_factor is not None or not group.reduce_grads:
                raise ValueError(
                    "model: sharded with a gradient divide factor of its own, or without gradient sync, expected "
                    "neither (set_requires_gradient_sync(True))"
                )
