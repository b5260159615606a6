"""A layer traced to one graph of plain tensors: output and tangent, from primals and tangents.

Reverse mode gives the gradients g(u) = Jᵀu of a layer's output, which are linear in u; reverse mode of those, with the
tangents ẋ in place of their gradients, gives the gradient of u, which is J ẋ. Traced, that holds no rule of
differentiation any more, and what is not needed for J ẋ (all of Jᵀu) is removed, as are the products of parameters
that do not move.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dentropy.model import attention


def trace(
    function: Callable[[list[int], list[Tensor]], Tensor],
    integers: list[int],
    primals: list[Tensor],
    tangents: list[Tensor | None],
    open_dims: list[Sequence[int]],
) -> GraphModule:
    """The graph (integers, primals, tangents that are not None) -> `function` of integers and primals, and its tangent,
    None where nothing that it depends on moves.

    open_dims: of each primal (and its tangent) the dimensions that may be of any size but 1, as may the integers; the
    others are part of the graph, and so are ranks, dtypes, strides and which tangents there are. The tensors are not
    computed with. The last but one dimension of the first primal is that of the tokens.

    Raises RuntimeError where the graph would hold for some sizes of these only, and whatever `function` raises.
    """
    stand_ins = _StandIns()
    integers = [stand_ins.integer(value) for value in integers]
    primals, tangents = (
        [stand_ins.tensor(*pair) for pair in zip(xs, open_dims, strict=True)] for xs in (primals, tangents)
    )
    moves = [t is not None for t in tangents]

    def output_and_tangent(integers, primals, tangents):
        return _output_and_tangent(lambda inputs: function(integers, inputs), primals, moves, tangents)

    with stand_ins.fake, enable_python_dispatcher(), attention.transposing():
        graph = make_fx(output_and_tangent)(integers, primals, [t for t in tangents if t is not None])
    stand_ins.check_open(primals[0].shape[-2])
    _read_sizes_once(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _output_and_tangent(function, primals, moves, tangents) -> tuple[Tensor, Tensor | None]:
    inputs = [torch.ops.aten.alias(primal) for primal in primals]
    moving = [x.requires_grad_() for x, moves_ in zip(inputs, moves, strict=True) if moves_]
    with torch.enable_grad():
        out = function(inputs)
        if not out.requires_grad:
            return out, None
        u = torch.zeros_like(out, requires_grad=True)
        gradients = torch.autograd.grad(out, moving, u, create_graph=True, allow_unused=True)
        used = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g is not None]
        (tangent,) = torch.autograd.grad([g for g, _ in used], u, [t for _, t in used])
    return out, tangent


class _StandIns:
    """Tensors without data and integers without value, for tracing."""

    def __init__(self):
        self._sizes = ShapeEnv(duck_shape=False)  # sizes that happen to be equal now are not taken for one
        self.fake = FakeTensorMode(shape_env=self._sizes)
        self._count = itertools.count()

    def tensor(self, x: Tensor | None, open_dims: Sequence[int]) -> Tensor | None:
        if x is None:
            return None
        if not open_dims:
            return self.fake.from_tensor(x, static_shapes=True)
        kinds = [DimDynamic.DYNAMIC if i in open_dims else DimDynamic.STATIC for i in range(x.ndim)]
        return self.fake.from_tensor(
            x,
            source=ConstantSource(f"input{next(self._count)}"),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds),
        )

    def integer(self, value: int) -> torch.SymInt:
        return self.tensor(torch.empty(value, dtype=torch.bool, device="meta"), [0]).shape[0]

    def check_open(self, n_tokens: int | torch.SymInt) -> None:
        if not isinstance(n_tokens, torch.SymInt) or not n_tokens.node.expr.free_symbols:
            raise RuntimeError(f"its graph would depend on the number of tokens, {n_tokens}")
        for guard in self._sizes.guards:
            if self._sizes.simplify(guard.expr) != True:  # noqa: E712 (an expression)
                raise RuntimeError(f"its graph would depend on the number of tokens ({guard.expr})")


def _read_sizes_once(graph: Graph) -> None:
    """Where first known, among the primals: a size read off Jᵀu would keep that in the graph."""
    known = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            first = known.setdefault(value.node.expr, node)
            if first is not node:
                node.replace_all_uses_with(first)
