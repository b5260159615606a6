"""Decoder layers compiled as one function of explicit primals and tangents, which all layers of one make share.

Uncompiled, each elementwise operation of a layer with tangents is several passes over memory. A compiler would fuse
them, but it cannot follow dual tensors: sizes become constants, and rules for tangents are dropped without a word. So
the layer is traced another way. Reverse mode gives the gradients g(u) = Jᵀu of its output, which are linear in u;
reverse mode of those, with the tangents ẋ in place of their gradients, gives the gradient of u, which is J ẋ. That
traces with the number of tokens left open, and what is not needed for J ẋ (all of Jᵀu) is removed from the graph, as
are the products of parameters that do not move. What remains is primal and tangent in one graph, without any rule of
differentiation in it, and torch.compile does the rest.

A layer uses a compiled form once its own first result, output and tangent, agreed with that of the uncompiled layer:
what the key of a form does not tell apart, that does.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.autograd import forward_ad
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dentropy import attention
from dentropy.microbatches import is_out_of_memory

# What tracing and compiling raise: errors of their own, which are RuntimeErrors, and whatever the code of a layer
# raises that meets sizes without values and tensors without data.
REFUSALS = (RuntimeError, AssertionError, TypeError, ValueError, AttributeError, LookupError)
# Attributes that say nothing about what a module computes: those that every module has, and its place.
NOT_STRUCTURE = {*vars(nn.Module()), "layer_idx", "forward"}


class FusedLayers:
    """The compiled forms of `layers`, made as they are needed and kept from pass to pass."""

    def __init__(self, layers: list[nn.Module]):
        self._layers = list(dict.fromkeys(layers))  # some models use a layer twice
        self._forms: dict[tuple, _Form | None] = {}  # None where making one failed
        self._settled: dict[tuple, _Form | None] = {}  # by layer: the form, None where the layer differs from it

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the layers compute through their compiled forms, except where gradients are on."""
        own = [layer.__dict__.get("forward") for layer in self._layers]
        try:
            for layer in self._layers:
                layer.forward = partial(self._forward, _Layer.of(layer))
            yield
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.forward = forward

    def _forward(self, layer: "_Layer", *args, **kwargs):
        call = None if torch.is_grad_enabled() else _Call.of(layer, args, kwargs)
        if call is None or call.has_sizes_of_one():
            return layer.forward(*args, **kwargs)
        if (layer.place, call.key) not in self._settled:
            return self._first(layer, call, args, kwargs)
        form = self._settled[layer.place, call.key]
        return layer.forward(*args, **kwargs) if form is None else call.run(form)

    def _first(self, layer: "_Layer", call: "_Call", args: tuple, kwargs: dict):
        """The uncompiled result; on the way the compiled form is made, where there is none, and compared."""
        before = call.versions()
        expected = layer.forward(*args, **kwargs)
        said, form = None, None
        try:
            if call.key not in self._forms:
                call.check_unchanged(before, args, kwargs)
                self._forms[call.key] = call.compile(expected)
            form = self._forms[call.key]
            if form is not None:
                with _no_size_stands_for_another():  # torch.compile compiles when it first runs
                    difference = _difference(call.run(form), expected)
                if not difference <= _tolerance(call.dtype):
                    form, said = None, f"compiled differs from uncompiled by {difference:.1e} of its norm"
        except REFUSALS as error:
            shortage = _shortage(error)
            if shortage is not None:
                raise shortage from None  # of this moment, not of the layer
            form = self._forms[call.key] = None
            said = f"cannot be compiled ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        self._settled[layer.place, call.key] = form
        if said is not None:
            warnings.warn(f"policy: {type(layer.module).__name__} {said}; goes on uncompiled", stacklevel=3)
        return expected


@dataclass
class _Layer:
    """A layer as it is during one pass."""

    module: nn.Module
    forward: Callable  # uncompiled
    slots: list[tuple[dict, str]]  # where its tensors stand: parameters, buffers and plain attributes
    structure: tuple  # what tells it from others but for its tensors and its place

    @classmethod
    def of(cls, layer: nn.Module) -> "_Layer":
        slots = [(store, name) for module in layer.modules()
                 for store in (module._parameters, module._buffers, vars(module))
                 for name, value in store.items() if isinstance(value, Tensor)]
        return cls(layer, layer.forward, slots, _structure(layer))

    @property
    def place(self) -> int:
        return id(self.module)


@dataclass
class _Form:
    """A compiled layer, and what it returns around its one tensor."""

    compiled: Callable
    returns: TreeSpec
    n_leaves: int
    where: int


@dataclass
class _Call:
    """A layer and the arguments of one call, taken apart into what a graph takes and what is part of it."""

    layer: _Layer
    leaves: list  # the arguments, flat
    spec: TreeSpec
    integers: list[int]
    primals: list[Tensor]  # arguments, then the layer's own tensors
    tangents: list[Tensor | None]
    key: tuple

    @classmethod
    def of(cls, layer: _Layer, args: tuple, kwargs: dict) -> "_Call":
        leaves, spec = tree_flatten((args, kwargs))
        # `attention` hands masks on as a size, in a tensor of no dimensions, and checks it in the uncompiled layer.
        masks = tuple(int(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 0)
        leaves = [None if isinstance(leaf, Tensor) and leaf.ndim == 0 else leaf for leaf in leaves]
        arguments = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        duals = map(forward_ad.unpack_dual, (*arguments, *(store[name] for store, name in layer.slots)))
        primals, tangents = map(list, zip(*duals, strict=True))
        primals = [x.detach() for x in primals]  # parameters of any kind and requires_grad are one to the compiler
        kinds = tuple(Tensor if isinstance(leaf, Tensor) else int if type(leaf) is int else _value(leaf)
                      for leaf in leaves)
        n = len(arguments)
        key = (layer.structure, spec, kinds, masks, primals[0].device,
               *((x.ndim, x.is_contiguous(), x.dtype) for x in primals[:n]),
               *(None if t is None else t.is_contiguous() for t in tangents[:n]),
               *((x.shape, x.stride(), x.dtype) for x in primals[n:]),
               *(None if t is None else t.stride() for t in tangents[n:]))
        return cls(layer, leaves, spec, [leaf for leaf in leaves if type(leaf) is int], primals, tangents, key)

    @property
    def dtype(self) -> torch.dtype:
        return self.primals[0].dtype

    def has_sizes_of_one(self) -> bool:
        """A single token, or none but sequences of one: a compiler takes 1 for a constant, here for once."""
        return self.primals[0].shape[-2] == 1 or min(self.integers, default=2) < 2

    def versions(self) -> list[int]:
        return [x._version for x in self.primals]

    def check_unchanged(self, before: list[int], args: tuple, kwargs: dict) -> None:
        """RuntimeError where the uncompiled layer did more than return something, or ran more than its own code."""
        leaves, spec = tree_flatten((args, kwargs))
        same = all(a is b for a, b in zip(leaves, self.leaves) if b is not None and not isinstance(b, int))
        if spec != self.spec or not same or self.versions() != before:
            raise RuntimeError("it changes its arguments or its buffers")
        if any(module._forward_hooks or module._forward_pre_hooks
               for module in self.layer.module.modules() if module is not self.layer.module):
            raise RuntimeError("hooks on its modules would not run")

    def run(self, form: _Form):
        primal, tangent = form.compiled(self.integers, self.primals, [t for t in self.tangents if t is not None])
        leaves = [None] * form.n_leaves
        leaves[form.where] = primal if tangent is None else forward_ad.make_dual(primal, tangent)
        return tree_unflatten(leaves, form.returns)

    def compile(self, expected) -> _Form:
        """The compiled layer; `expected` is what it returns."""
        leaves, returns = tree_flatten(expected)
        where = [i for i, leaf in enumerate(leaves) if leaf is not None]
        if len(where) != 1 or not isinstance(leaves[where[0]], Tensor):
            raise RuntimeError(f"it returns {len(where)} values, expected one tensor")
        n_arguments = len(self.primals) - len(self.layer.slots)
        for x in (*self.primals[n_arguments:], *self.tangents[n_arguments:]):
            if x is not None:
                torch._dynamo.mark_static(x)  # a layer's own tensors have one shape; kernels may be made for it
        compiled = torch.compile(self.trace(), dynamic=True)
        return _Form(compiled, returns, len(leaves), where[0])

    def trace(self):
        """The graph (integers, primals, tangents that are not None) -> output and its tangent."""
        from torch._dynamo.source import ConstantSource
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        sizes = ShapeEnv(duck_shape=False)
        fake = FakeTensorMode(shape_env=sizes)

        def open_sizes(x, name):
            return None if x is None else fake.from_tensor(x, source=ConstantSource(name))

        def fixed_sizes(x):
            return None if x is None else fake.from_tensor(x, static_shapes=True)

        n = len(self.primals) - len(self.layer.slots)
        integers = [open_sizes(torch.empty(value, device="meta"), f"integer{i}").shape[0]
                    for i, value in enumerate(self.integers)]
        primals, tangents = ([open_sizes(x, f"{name}{i}") for i, x in enumerate(xs[:n])] + [*map(fixed_sizes, xs[n:])]
                             for name, xs in (("primal", self.primals), ("tangent", self.tangents)))
        moves = [t is not None for t in tangents]
        with fake, enable_python_dispatcher(), attention.transposing():
            graph = make_fx(partial(self._output_and_tangent, moves))(
                integers, primals, [t for t in tangents if t is not None])
        _check_open(sizes, primals[0].shape[-2])
        _read_sizes_once(graph.graph)
        graph.graph.eliminate_dead_code()
        graph.recompile()
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
        """The layer on other integers and tensors, arguments and its own."""
        integers, tensors = iter(integers), iter(inputs)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else next(integers) if type(leaf) is int else leaf
                  for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        slots = self.layer.slots
        own = [store[name] for store, name in slots]
        try:
            for (store, name), tensor in zip(slots, tensors, strict=True):
                store[name] = tensor
            return self.layer.forward(*args, **kwargs)
        finally:
            for (store, name), tensor in zip(slots, own, strict=True):
                store[name] = tensor


def _no_size_stands_for_another():
    """Dimensions that happen to be equal now must not be taken for one."""
    return torch.fx.experimental._config.patch(use_duck_shape=False)


def _check_open(sizes, n_tokens) -> None:
    """RuntimeError where the graph holds for some numbers of tokens only."""
    if not isinstance(n_tokens, torch.SymInt) or not n_tokens.node.expr.free_symbols:
        raise RuntimeError("it is made for one number of tokens")
    for guard in sizes.guards:
        if sizes.simplify(guard.expr) != True:  # noqa: E712 (an expression)
            raise RuntimeError(f"its operations depend on sizes ({guard.expr})")


def _read_sizes_once(graph: Graph) -> None:
    """Where first known, among the primals: a size read off Jᵀu would keep that in the graph."""
    known = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            first = known.setdefault(value.node.expr, node)
            if first is not node:
                node.replace_all_uses_with(first)


def _structure(layer: nn.Module) -> tuple:
    """What tells layers apart but for their tensors and their place: equal layers may share a compiled form."""
    return tuple((path, type(module), tuple((name, _value(value)) for name, value in sorted(vars(module).items())
                                            if name not in NOT_STRUCTURE and not isinstance(value, Tensor)))
                 for path, module in layer.named_modules())


def _value(x):
    """Something hashable that is equal for equal settings: the value where it is plain, else the object's identity."""
    if x is None or isinstance(x, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return type(x), x
    if isinstance(x, (list, tuple)):
        return tuple(map(_value, x))
    if isinstance(x, dict):
        return tuple((_value(key), _value(value)) for key, value in x.items())
    return id(x)


def _shortage(error: BaseException | None) -> RuntimeError | None:
    """The out-of-memory error that `error` is, or that it wraps."""
    while error is not None:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _difference(result, expected) -> float:
    """The larger of the two relative differences in norm, of output and tangent; infinite if one lacks its tangent."""
    got, want = ([x for x in tree_flatten(value)[0] if isinstance(x, Tensor)][0] for value in (result, expected))
    differences = []
    for x, y in zip(forward_ad.unpack_dual(got), forward_ad.unpack_dual(want), strict=True):
        if x is None or y is None:
            differences.append(0.0 if x is y else float("inf"))
        else:
            scale = y.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
            differences.append(float((x.double() - y.double()).norm() / scale))
    return float(torch.tensor(differences).max())  # which a NaN survives


def _tolerance(dtype: torch.dtype) -> float:
    """Fused operations round less often, so they differ by some units of the dtype, in float32 by those of sums."""
    return max(4 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps)
