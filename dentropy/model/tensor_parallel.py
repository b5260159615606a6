"""A model whose products the ranks share (tensor parallel, transformers' `tp_plan`), for the time of a pass.

Each rank holds some rows or columns of a weight. Around them transformers puts forwards that go through DTensors or
reduce in place, which drop a tangent without a word. For a pass each of these modules gets one that works on this
rank's part and adds over ranks what is to be added, tangents and gradients too (`rank_sums`). All ranks run the same
tokens and end with the same numbers.

A head that alone is cut by rows, of a backbone that every rank holds whole, is the smallest of these models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dentropy.model.in_place import TURN, in_place_of_parameters
from dentropy.model.rank_sums import shared, summed
from dentropy.model.shards import is_shard, own_part, place_of

Make = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Cut:
    """A module of which each rank runs a part; `moved` are this rank's parts of parameters that are not as they were,
    by id()."""

    module: nn.Module
    group: object
    moved: dict[int, Tensor]

    def part(self, name: str) -> Tensor | None:
        """This rank's part of a parameter, as it stands; in reverse mode a function of the parameter."""
        p = self.module._parameters.get(name)
        return None if p is None else self.moved.get(id(p), own_part(p))

    def place(self, dim: int) -> tuple[int, int]:
        """Where this rank's part of the weight begins in a dimension of it, and how long it is."""
        return place_of(self.module._parameters["weight"], dim)

    def put_together(self, x: Tensor, dim: int) -> Tensor:
        """[..., all] of the ranks' x [..., part], for a part in this dimension of the weight."""
        first, length = self.place(dim)
        behind = self.module._parameters["weight"].shape[dim] - first - length
        return summed(functional.pad(x, (first, behind)), self.group)

    @contextmanager
    def standing(self, part: Callable[[str], Tensor | None] | None = None, **attributes) -> Iterator[Callable]:
        """The forward of the module's class, with parts in the places of its parameters, and other attributes."""
        parameters, before = dict(self.module._parameters), {name: getattr(self.module, name) for name in attributes}
        try:
            self.module._parameters.update({name: (part or self.part)(name) for name in parameters})
            for name, value in attributes.items():
                setattr(self.module, name, value)
            yield partial(type(self.module).forward, self.module)
        finally:
            self.module._parameters.update(parameters)
            for name, value in before.items():
                setattr(self.module, name, value)


def _columns(cut: _Cut, x: Tensor) -> Tensor:
    return functional.linear(shared(x, cut.group), cut.part("weight"), cut.part("bias"))


def _columns_put_together(cut: _Cut, x: Tensor) -> Tensor:
    return cut.put_together(_columns(cut, x), 0)


def _rows(cut: _Cut, x: Tensor) -> Tensor:
    out, bias = summed(functional.linear(x, cut.part("weight")), cut.group), cut.part("bias")
    return out if bias is None else out + bias


def _rows_of_whole(cut: _Cut, x: Tensor) -> Tensor:
    return _rows(cut, shared(x, cut.group).narrow(-1, *cut.place(1)))


def _vocabulary(cut: _Cut, ids: Tensor) -> Tensor:
    first, length = cut.place(0)
    own, padding = (ids >= first) & (ids < first + length), cut.module.padding_idx
    padding = padding - first if padding is not None and first <= padding < first + length else None
    with cut.standing(padding_idx=padding) as forward:
        found = forward((ids - first).clamp(0, length - 1))
    return summed(found * own[..., None], cut.group)


def _width(cut: _Cut, ids: Tensor) -> Tensor:
    with cut.standing() as forward:
        return cut.put_together(forward(ids), 1)


def _experts(cut: _Cut, x: Tensor, index: Tensor, weights: Tensor, *more) -> Tensor:
    with cut.standing() as forward:
        return summed(forward(shared(x, cut.group), index, shared(weights, cut.group), *more), cut.group)


def _of_own_heads(cut: _Cut, *args, **kwargs) -> Tensor:
    """A module that every rank holds whole, and runs on its part of the activations."""
    with cut.standing(lambda name: shared(cut.part(name), cut.group)) as forward:
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class _Form:
    """How a module runs in parts: the forward, for which classes, and in which dimension each parameter is cut."""

    run: Callable
    kind: type[nn.Module]
    cut: dict[str, int | None] = field(default_factory=dict)  # None: not at all


_COLUMNS, _ROWS = {"weight": 0, "bias": 0}, {"weight": 1, "bias": None}
# By transformers' name.
_FORMS = {
    "colwise": _Form(_columns, nn.Linear, _COLUMNS),
    "packed_colwise": _Form(_columns, nn.Linear, _COLUMNS),
    "colwise_gather_output": _Form(_columns_put_together, nn.Linear, _COLUMNS),
    "colwise_rep": _Form(_columns_put_together, nn.Linear, _COLUMNS),
    "rowwise": _Form(_rows, nn.Linear, _ROWS),
    "rowwise_split_input": _Form(_rows_of_whole, nn.Linear, _ROWS),
    "rowwise_rep": _Form(_rows_of_whole, nn.Linear, _ROWS),
    "embedding_rowwise": _Form(_vocabulary, nn.Embedding, {"weight": 0}),
    "embedding_colwise": _Form(_width, nn.Embedding, {"weight": 1}),
    "moe_tp_experts": _Form(_experts, nn.Module),
    "replicated_with_grad_allreduce": _Form(_of_own_heads, nn.Module),
}
# PEFT cuts the factor that is on the cut side of its layer, and gives it the layer's style.
_OF_LORA = {"lora_A": "rowwise", "lora_B": "colwise"}


class TensorParallel:
    """The modules that run in parts, and their forwards of a pass."""

    in_unison = True

    def __init__(self, model: nn.Module, forms: list[tuple[nn.Module, Callable]], group):
        self._model, self._group = model, group
        self._moved: dict[int, Tensor] = {}
        self._forwards = [(module, partial(run, _Cut(module, group, self._moved))) for module, run in forms]

    @classmethod
    def of(cls, model: nn.Module, shards: Mapping[str, Tensor]) -> TensorParallel:
        """Of a model with parameters that are in parts; ValueError, by name, for what cannot be handled."""
        for name, p in shards.items():
            _check_layout(name, p)
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        cut_by_plan = (getattr(causal_lm, "tp_size", None) or 1) > 1
        plan, head = (causal_lm.tp_plan or {}) if cut_by_plan else {}, causal_lm.get_output_embeddings()
        forms = []
        for name, module in causal_lm.named_modules():
            is_cut = any(map(is_shard, module._parameters.values()))
            style = _style(name, is_cut, plan)
            if not is_cut and (style in (None, "replicate") or hasattr(module, "base_layer")):  # PEFT's, around it
                continue
            if style is None and module is head:
                style = "colwise_gather_output"
            _check_form(name, module, style)
            if not _has_hooks(module):
                forms.append((module, _FORMS[style].run))
            elif module is not head:  # of a head only the weights are used
                raise ValueError(f"model: {name} is tensor parallel by hooks around its forward, expected {EXPECTED}")
        return cls(model, forms, next(iter(shards.values())).device_mesh.get_group())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, modules that are cut run the forwards of a pass."""
        with self._with_forwards(self._forwards):
            yield

    @contextmanager
    def running_its_own(self) -> Iterator[None]:
        """Inside, they run transformers' forwards, but for a head that has none to go with its weights."""
        bare = [(module, forward) for module, forward in self._forwards if "forward" not in vars(module)]
        with self._with_forwards([each for each in bare if any(map(is_shard, each[0]._parameters.values()))]):
            yield

    @contextmanager
    def instead(self, makes: Mapping[int, Make]) -> Iterator[None]:
        """Inside, make(x) stands for each parameter by its id(), x being what would stand there without: this rank's
        part. They are made at once."""
        standing = {id(p): p for p in self._model.parameters() if id(p) in makes}
        if makes.keys() - standing.keys():
            raise RuntimeError("some parameters to stand in for are not the model's")
        made = {key: make(self._moved.get(key, own_part(standing[key].detach()))) for key, make in makes.items()}
        before = dict(self._moved)
        self._moved |= {key: x for key, x in made.items() if is_shard(standing[key])}
        whole = {key: x for key, x in made.items() if not is_shard(standing[key])}
        try:
            with self.running(), in_place_of_parameters(self._model, whole):
                yield
        finally:
            self._moved.clear()
            self._moved |= before

    def head(self, module: nn.Module) -> tuple[Tensor, Tensor | None, object]:
        """Weight and bias of the head as they stand, and the group over whose ranks their rows are spread; None where
        they are whole."""
        cut = _Cut(module, self._group, self._moved)
        return cut.part("weight"), cut.part("bias"), self._group if is_shard(module._parameters["weight"]) else None

    def as_it_stands(self, v: Tensor) -> Tensor:
        """v in the form of the parameters that stand in a pass."""
        return own_part(v)

    def rest(self) -> None:
        """Between passes every module is as it was found."""

    @contextmanager
    def _with_forwards(self, forwards: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
        with TURN:
            found = [(module, vars(module).get("forward")) for module, _ in forwards]
            try:
                for module, forward in forwards:
                    module.forward = forward
                yield
            finally:
                for module, forward in found:
                    del module.forward
                    if forward is not None:
                        module.forward = forward


EXPECTED = f"transformers' tp_plan of {', '.join(_FORMS)}, or whole weights"


def _style(name: str, is_cut: bool, plan: Mapping[str, str]) -> str | None:
    """What the plan calls a module, by its name in the model that PEFT wraps; None where it says nothing."""
    adapter = re.search(r"\.(lora_[AB])\.[^.]+$", name)
    if adapter:
        return _OF_LORA[adapter[1]] if is_cut else None
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name.removesuffix(".base_layer")))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _check_layout(name: str, p: Tensor) -> None:
    mesh, placements = p.device_mesh, p.placements
    if mesh.ndim > 1 or mesh.size() != dist.get_world_size():
        raise ValueError(
            f"model: {name} is on a mesh of {tuple(mesh.shape)} ranks, expected one dimension with all "
            f"{dist.get_world_size()} ranks"
        )
    dim = getattr(placements[0], "dim", None)
    if dim is not None and -(-p.shape[dim] // mesh.size()) * (mesh.size() - 1) >= p.shape[dim]:
        raise ValueError(f"model: {name}: {tuple(p.shape)} leaves some of {mesh.size()} ranks nothing, expected fewer")


def _check_form(name: str, module: nn.Module, style: str | None) -> None:
    """ValueError where nothing is known of how a module runs in parts."""
    form = _FORMS.get(style)
    places = {n: p.placements if is_shard(p) else "whole" for n, p in module._parameters.items() if p is not None}
    if form is None:
        said = "by no plan of transformers" if style is None else f"as {style!r}"
        raise ValueError(f"model: {name} is tensor parallel {said} ({places}), expected {EXPECTED}")
    if not isinstance(module, form.kind) or (form.kind is nn.Linear and type(module) is not nn.Linear):
        raise ValueError(
            f"model: {name} is a {type(module).__name__} and tensor parallel as {style!r}, expected {EXPECTED}"
        )
    for parameter, p in module._parameters.items():
        dim = getattr(p.placements[0], "dim", None) if is_shard(p) else None
        # Of experts every rank has a part of each one.
        other = dim in (None, 0) if form.run is _experts else dim is not None
        if p is not None and (dim != form.cut[parameter] if parameter in form.cut else other):
            raise ValueError(
                f"model: {name}.{parameter} is tensor parallel as {style!r} and lies as {places[parameter]}, "
                f"expected {EXPECTED}"
            )
