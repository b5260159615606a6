"""Decoder layers compiled as one function of explicit primals and tangents, which all layers of one make share.

Uncompiled, each elementwise operation of a layer with tangents is several passes over memory. A compiler would fuse
them, but it cannot follow dual tensors: sizes become constants, and rules for tangents are dropped without a word. So
the layer is traced another way. Reverse mode gives the gradients g(u) = Jᵀu of its output, which are linear in u;
reverse mode of those, with the tangents ẋ in place of their gradients, gives the gradient of u, which is J ẋ. That
traces with the number of tokens left open, and what is not needed for J ẋ (all of Jᵀu) is removed from the graph, as
are the products of parameters that do not move. What remains is primal and tangent in one graph, without any rule of
differentiation in it, and torch.compile does the rest.

A compiled layer is used after its first result, output and tangent, agreed with that of the uncompiled one.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dentropy import attention
from dentropy.microbatches import is_out_of_memory


class FusedLayers:
    """The compiled forms of `layers`, made as they are needed and kept from pass to pass."""

    def __init__(self, layers: list[nn.Module]):
        self._layers = layers
        self._compiled: dict[tuple, Callable | None] = {}  # None where it failed

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the layers compute through their compiled forms, except where gradients are on."""
        own = [layer.__dict__.get("forward") for layer in self._layers]
        try:
            for layer in self._layers:
                layer.forward = partial(self._forward, layer, layer.forward)
            yield
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _forward(self, layer: nn.Module, forward: Callable, *args, **kwargs):
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        call = _Call.of(layer, forward, args, kwargs)
        if call.key not in self._compiled:
            return self._first(layer, call, forward(*args, **kwargs))
        compiled = self._compiled[call.key]
        return forward(*args, **kwargs) if compiled is None else call.run(compiled)

    def _first(self, layer: nn.Module, call: "_Call", expected):
        """Compiles the layer, compares, and returns the uncompiled result."""
        self._compiled[call.key] = None
        try:
            compiled = torch.compile(call.trace(), dynamic=True)
            difference = _difference(call.run(compiled), expected)
        except RuntimeError as error:  # what tracing and compiling raise
            if is_out_of_memory(error):
                del self._compiled[call.key]
                raise
            said = f"cannot be compiled ({str(error).strip().splitlines()[0]})"
        else:
            if difference <= _tolerance(call.dtype):
                self._compiled[call.key] = compiled
                return expected
            said = f"compiled differs from uncompiled by {difference:.1e} of its norm"
        warnings.warn(f"policy: {type(layer).__name__} {said}; goes on uncompiled", stacklevel=2)
        return expected


@dataclass
class _Call:
    """A layer and the arguments of one call, taken apart into what a graph takes and what is part of it."""

    forward: Callable
    slots: list[tuple[dict, str]]  # where the layer's parameters stand
    leaves: list  # the arguments, flat
    spec: TreeSpec
    integers: list[int]
    primals: list[Tensor]  # arguments, then parameters
    tangents: list[Tensor | None]
    key: tuple

    @classmethod
    def of(cls, layer: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> "_Call":
        leaves, spec = tree_flatten((args, kwargs))
        # `attention` hands masks on as a size, in a tensor of no dimensions, and checks it in the uncompiled layer.
        masks = tuple(int(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 0)
        leaves = [None if isinstance(leaf, Tensor) and leaf.ndim == 0 else leaf for leaf in leaves]
        slots = [(module._parameters, name) for module in layer.modules()
                 for name, parameter in module._parameters.items() if parameter is not None]
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + [where[name] for where, name in slots]
        primals, tangents = map(list, zip(*map(forward_ad.unpack_dual, inputs), strict=True))
        kinds = tuple(Tensor if isinstance(leaf, Tensor) else int if type(leaf) is int else leaf for leaf in leaves)
        n_arguments = len(inputs) - len(slots)
        shapes = tuple(p.ndim if i < n_arguments else p.shape for i, p in enumerate(primals))
        key = (_structure(layer), str(spec), kinds, masks, shapes, tuple(p.dtype for p in primals),
               tuple(t is not None for t in tangents))
        return cls(forward, slots, leaves, spec, [leaf for leaf in leaves if type(leaf) is int], primals, tangents, key)

    @property
    def dtype(self) -> torch.dtype:
        return self.primals[0].dtype

    def run(self, compiled: Callable):
        primal, tangent = compiled(self.integers, self.primals, [t for t in self.tangents if t is not None])
        return primal if tangent is None else forward_ad.make_dual(primal, tangent)

    def trace(self) -> GraphModule:
        """The graph (integers, primals, tangents that are not None) -> output and its tangent."""
        moves = [t is not None for t in self.tangents]
        # Dimensions that happen to be equal now must not be taken for one.
        with torch.fx.experimental._config.patch(use_duck_shape=False), attention.transposing():
            graph = make_fx(partial(self._output_and_tangent, moves), tracing_mode="symbolic",
                            _allow_non_fake_inputs=True)(self.integers, self.primals,
                                                         [t for t in self.tangents if t is not None])
        graph.graph.eliminate_dead_code()
        graph.recompile()
        for x in (*self.primals[len(self.primals) - len(self.slots):], *self.tangents[-len(self.slots):]):
            if x is not None:
                torch._dynamo.mark_static(x)  # parameters have one shape; kernels may be made for it
        return graph

    def _output_and_tangent(self, moves: list[bool], integers, primals, tangents) -> tuple[Tensor, Tensor | None]:
        inputs = [torch.ops.aten.alias(primal) for primal in primals]
        moving = [x.requires_grad_() for x, moves_ in zip(inputs, moves, strict=True) if moves_]
        with torch.enable_grad():
            out, = [x for x in tree_flatten(self._apply(integers, inputs))[0] if isinstance(x, Tensor)]
            if not out.requires_grad:
                return out, None
            u = torch.zeros_like(out, requires_grad=True)
            gradients = torch.autograd.grad(out, moving, u, create_graph=True, allow_unused=True)
            used = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g is not None]
            tangent, = torch.autograd.grad([g for g, _ in used], u, [t for _, t in used])
        return out, tangent

    def _apply(self, integers, inputs):
        """The layer on other integers and tensors, arguments and parameters."""
        integers, tensors = iter(integers), iter(inputs)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else next(integers) if type(leaf) is int else leaf
                  for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        own = [where[name] for where, name in self.slots]
        try:
            for (where, name), parameter in zip(self.slots, tensors, strict=True):
                where[name] = parameter
            return self.forward(*args, **kwargs)
        finally:
            for (where, name), parameter in zip(self.slots, own, strict=True):
                where[name] = parameter


def _structure(module: nn.Module) -> tuple:
    """What tells layers apart but for their tensors and their place: equal layers share a compiled form."""
    return tuple((path, type(part), tuple(sorted(
        (name, value) for name, value in vars(part).items()
        if isinstance(value, (bool, int, float, str)) and name not in ("layer_idx", "training"))))
        for path, part in module.named_modules())


def _difference(result, expected) -> float:
    """The larger of the two relative differences in norm, of output and tangent; infinite if one lacks its tangent."""
    worst = 0.0
    for got, want in zip(forward_ad.unpack_dual(result), forward_ad.unpack_dual(expected), strict=True):
        if got is None or want is None:
            worst = worst if got is want else float("inf")
        else:
            scale = want.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
            worst = max(worst, float((got.double() - want.double()).norm() / scale))
    return worst


def _tolerance(dtype: torch.dtype) -> float:
    """Fused operations round less often, so they differ by some units of the dtype, in float32 by those of sums."""
    return max(4 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps)
