"""Decoder layers compiled as one function of explicit primals and tangents, which all layers of one make share.

Uncompiled, each elementwise operation of a layer with tangents is several passes over memory. A compiler would fuse
them, but it cannot follow dual tensors: sizes become constants, and rules for tangents are dropped without a word. So
the layer is traced to plain operations first (`trace`), with the number of tokens left open.

A layer uses a compiled form once its own first result, output and tangent, agreed with that of the uncompiled layer:
what the key of a form does not tell apart, that does.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dentropy.model.memory import is_out_of_memory

# What tracing and compiling raise: errors of their own, which are RuntimeErrors, and whatever the code of a layer
# raises that meets sizes without values and tensors without data.
REFUSALS = (RuntimeError, AssertionError, TypeError, ValueError, AttributeError, LookupError)
# Attributes that say nothing about what a module computes: those that every module has, and its place.
NOT_STRUCTURE = {*vars(nn.Module()), "layer_idx"}


class FusedLayers:
    """The compiled forms of `layers`, made as they are needed and kept from pass to pass."""

    def __init__(self, layers: list[nn.Module]):
        self._layers = list(dict.fromkeys(layers))  # some models use a layer twice
        self._forms: dict[tuple, _Form | None] = {}  # None where making one failed
        self._settled: dict[tuple, _Form | None] = {}  # by layer: the form, None where the layer differs from it
        self._kinds: dict[tuple, int] = {}  # of layers with their own tensors; a number is quicker to hash

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the layers compute through their compiled forms, except where gradients are on."""
        own = [layer.__dict__.get("forward") for layer in self._layers]
        try:
            for layer in self._layers:
                layer.forward = partial(self._forward, _Layer.of(layer, self._kinds))
            yield
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.forward = forward

    def _forward(self, layer: "_Layer", *args, **kwargs):
        call = None if torch.is_grad_enabled() else _Call.of(layer, args, kwargs)
        if call is None or call.is_one_token():
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
    kinds: dict[tuple, int]
    own: "_OwnTensors | None" = None  # as last seen

    @classmethod
    def of(cls, layer: nn.Module, kinds: dict[tuple, int]) -> "_Layer":
        slots = [
            (store, name)
            for module in layer.modules()
            for store in (module._parameters, module._buffers, vars(module))
            for name, value in store.items()
            if isinstance(value, Tensor)
        ]
        return cls(layer, layer.forward, slots, _structure(layer), kinds)

    @property
    def place(self) -> int:
        return id(self.module)

    def tensors(self) -> "_OwnTensors":
        """Taken apart once for all microbatches of a pass, as long as the same tensors stand in the slots."""
        standing = [store[name] for store, name in self.slots]
        if self.own is None or any(a is not b for a, b in zip(standing, self.own.standing, strict=True)):
            self.own = _OwnTensors.of(standing, self.structure, self.kinds)
        return self.own


@dataclass
class _OwnTensors:
    """The tensors of a layer, as they stand in its slots and taken apart."""

    standing: list[Tensor]
    primals: list[Tensor]
    tangents: list[Tensor | None]
    kind: int  # equal where layers have equal structures and tensors of equal forms

    @classmethod
    def of(cls, standing: list[Tensor], structure: tuple, kinds: dict[tuple, int]) -> "_OwnTensors":
        duals = [forward_ad.unpack_dual(x) for x in standing]
        primals = [primal.detach() for primal, _ in duals]  # parameters and requires_grad are one to the compiler
        tangents = [tangent for _, tangent in duals]
        forms = (
            *((x.shape, x.stride(), x.dtype) for x in primals),
            *(None if t is None else t.stride() for t in tangents),
        )
        return cls(standing, primals, tangents, kinds.setdefault((structure, forms), len(kinds)))


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
    open_dims: list[Sequence[int]]  # the dimensions of each that a microbatch may change
    key: tuple

    @classmethod
    def of(cls, layer: _Layer, args: tuple, kwargs: dict) -> "_Call":
        leaves, spec = tree_flatten((args, kwargs))
        # `attention` hands masks on as a size, in a tensor of no dimensions, and checks it in the uncompiled layer.
        masks = tuple(int(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 0)
        leaves = [None if isinstance(leaf, Tensor) and leaf.ndim == 0 else leaf for leaf in leaves]
        duals = [forward_ad.unpack_dual(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        primals, tangents = [primal.detach() for primal, _ in duals], [tangent for _, tangent in duals]
        own = layer.tensors()
        kinds = tuple(
            Tensor if isinstance(leaf, Tensor) else int if _is_open(leaf) else _value(leaf) for leaf in leaves
        )
        open_dims = [_open_dims(x, primals[0]) for x in primals]
        key = (
            own.kind,
            spec,
            kinds,
            masks,
            primals[0].device,
            *((x.ndim, x.shape[len(dims) :], x.is_contiguous(), x.dtype) for x, dims in zip(primals, open_dims)),
            *(None if t is None else t.is_contiguous() for t in tangents),
        )
        return cls(
            layer,
            leaves,
            spec,
            [leaf for leaf in leaves if _is_open(leaf)],
            [*primals, *own.primals],
            [*tangents, *own.tangents],
            [*open_dims, *[()] * len(layer.slots)],
            key,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.primals[0].dtype

    def is_one_token(self) -> bool:
        """A compiler takes a size of 1 for a constant, here for once."""
        return self.primals[0].shape[-2] == 1

    def versions(self) -> list[int]:
        return [x._version for x in self.primals]

    def check_unchanged(self, before: list[int], args: tuple, kwargs: dict) -> None:
        """RuntimeError where the uncompiled layer did more than return something, or ran more than its own code."""
        leaves, spec = tree_flatten((args, kwargs))
        same = all(a is b for a, b in zip(leaves, self.leaves) if isinstance(b, Tensor))
        if spec != self.spec or not same or self.versions() != before:
            raise RuntimeError("it changes its arguments or its buffers")
        if any(
            module._forward_hooks or module._forward_pre_hooks
            for module in self.layer.module.modules()
            if module is not self.layer.module
        ):
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
        from dentropy.model.compiled_layers.trace import trace  # torch.compile's modules load on first use

        graph = trace(self.apply, self.integers, self.primals, self.tangents, self.open_dims)
        for x, t, open_dims in zip(self.primals, self.tangents, self.open_dims, strict=True):
            fixed = [i for i in range(x.ndim) if i not in open_dims]
            for tensor in (x,) if t is None else (x, t):  # of this call, not the model's: kernels may be made for them
                torch._dynamo.mark_static(tensor, fixed)
        return _Form(torch.compile(graph, dynamic=True), returns, len(leaves), where[0])

    def apply(self, integers: list[int], inputs: list[Tensor]) -> Tensor:
        """What the layer returns on other integers and tensors, arguments and its own."""
        integers, tensors = iter(integers), iter(inputs)
        leaves = [
            next(tensors) if isinstance(leaf, Tensor) else next(integers) if _is_open(leaf) else leaf
            for leaf in self.leaves
        ]
        args, kwargs = tree_unflatten(leaves, self.spec)
        slots = self.layer.slots
        own = [store[name] for store, name in slots]
        try:
            for (store, name), tensor in zip(slots, tensors, strict=True):
                store[name] = tensor
            (out,) = [x for x in tree_flatten(self.layer.forward(*args, **kwargs))[0] if isinstance(x, Tensor)]
            return out
        finally:
            for (store, name), tensor in zip(slots, own, strict=True):
                store[name] = tensor


def _open_dims(x: Tensor, hidden: Tensor) -> range:
    """The dimensions of an argument that a microbatch may change. Not the features of [..., tokens, features]."""
    has_features = 2 <= x.ndim <= 3 and x.shape[-2] == hidden.shape[-2] and (x.is_floating_point() or x.is_complex())
    return range(x.ndim - has_features)


def _is_open(leaf) -> bool:
    """Whether an argument is an integer that a microbatch may change; 0 and 1 are switches, or as good as."""
    return type(leaf) is int and leaf > 1


def _no_size_stands_for_another():
    """Dimensions that happen to be equal now must not be taken for one."""
    return torch.fx.experimental._config.patch(use_duck_shape=False)


def _structure(layer: nn.Module) -> tuple:
    """What tells layers apart but for their tensors and their place: equal layers may share a compiled form."""
    return tuple(
        (
            path,
            type(module),
            tuple(
                (name, _value(value))
                for name, value in sorted(vars(module).items())
                if name not in NOT_STRUCTURE and not isinstance(value, Tensor)
            ),
        )
        for path, module in layer.named_modules()
    )


def _value(x):
    """Something hashable that is equal for equal settings: the value where it is plain, else the object's identity."""
    if x is None or isinstance(x, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return type(x), x
    if isinstance(x, (list, tuple)):
        return tuple(map(_value, x))
    if isinstance(x, dict):
        return tuple((_value(key), _value(value)) for key, value in x.items())
    if isinstance(x, partial):
        return _value((x.func, x.args, x.keywords))
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
    got, want = (next(x for x in tree_flatten(value)[0] if isinstance(x, Tensor)) for value in (result, expected))
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
