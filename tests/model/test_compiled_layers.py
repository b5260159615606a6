"""Layers in their compiled form against themselves uncompiled; the compiler is stood in for by one that is quick."""

import gc
import logging
import warnings
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from models import (
    InFloat64,
    random_batch,
    random_direction,
    random_model,
    reference_columns,
    relative_errors,
    with_lora,
)

from dentropy import Direction, PackedBatch, Policy, measure, moved_weights, policy_gradient_direction
from dentropy.model.compiled_layers import layers, trace
from dentropy.passes.microbatches import Microbatch

# Each compilation takes seconds: one of each kind always, the others among the slow.
QUICK = ["llama"]
SLOW = [
    "gpt2",
    "gpt_neox",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gemma2",
    "gemma3",
    "olmo2",
    "granite",
    "cohere",
    "starcoder2",
]
DENSE = QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
mm = torch.ops.aten.mm.default
compile_for_real = torch.compile


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """Everything of torch.compile but the making of kernels; and pytest formats none of its thousands of records."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    monkeypatch.setattr(torch, "compile", partial(compile_for_real, backend="aot_eager"))


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """The graphs that are compiled, run as they are but for one thing that compilers do: of a derivative whose formula
    works in place, what nothing uses is removed too."""
    seen = []

    def interpreted(graph, **_settings):
        graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        graph.recompile()
        seen.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", interpreted)
    return seen


@contextmanager
def nothing_said():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="policy: ")
        yield


@contextmanager
def nothing_compiled_again():
    with nothing_said(), torch._dynamo.config.patch(error_on_recompile=True):
        yield


def assert_same(found, expected, bar=1e-5):
    errors = relative_errors(found, expected)
    assert max(errors.values()) <= bar, errors


def everything(model) -> Direction:
    return random_direction(model)


def batch_of(totals) -> PackedBatch:
    """Rollouts that are run as these many tokens: the last of a response is not."""
    return PackedBatch.from_lists([[3]] * len(totals), [[4 + i % 7 for i in range(n)] for n in totals])


def forms(policy) -> int:
    return sum(form is not None for form in policy._compiled_layers._forms.values())


def test_weights_that_move_within_a_pass_are_seen(graphs):
    """What is known of a layer's tensors is kept for the pass, and no longer than they stand there."""
    model = random_model("llama")
    direction, batch = everything(model), random_batch()
    found = []
    for policy in (Policy(model), Policy(model, compile_layers=True)):
        row = Microbatch.of(batch, np.flatnonzero(batch.response_lens), policy.device).row
        with policy.ready(), torch.no_grad():
            for eta in (0.0, 0.0, 0.1):
                with moved_weights(policy, direction, eta, tangent=True):
                    stats = policy.score(row, tangent=True)
                    found.append([x.double() for x in stats if x is not None])
    for plain, compiled in zip(found[:3], found[3:], strict=True):
        for x, y in zip(plain, compiled, strict=True):
            assert float((y - x).abs().max()) <= 1e-5 * float(x.square().mean().sqrt())


@pytest.mark.parametrize("name", DENSE)
def test_an_architecture(name):
    """All at one budget, then other budgets and rollouts without compiling again: microbatches of one sequence and of
    many, of one token (which run uncompiled) and of as many as the model is wide."""
    model = random_model(name)
    direction, plain = everything(model), Policy(model)
    with nothing_said():
        policy = Policy(model, compile_layers=True)
        batch = random_batch(temperature=0.8)
        assert_same(measure(policy, batch, direction, token_budget=30), measure(plain, batch, direction))
    makes = 2 if name in ("gemma2", "gemma3") else 1
    assert forms(policy) == len(policy._compiled_layers._forms) == makes
    with nothing_compiled_again():
        for batch, budget in (
            (random_batch(3, rollouts=14), 1),
            (random_batch(4, rollouts=14), 17),
            (random_batch(5, rollouts=30), 4096),
            (batch_of([32, 1, 8, 4, 2, 16, 1, 1]), 1),
        ):
            assert_same(measure(policy, batch, direction, token_budget=budget), measure(plain, batch, direction))
    assert forms(policy) == makes


@pytest.mark.slow
def test_each_make_has_a_form(graphs):
    """gemma2's layers see all or a window, which is longer than some sequences and shorter than others."""
    model = random_model("gemma2")
    direction, batch, policy = everything(model), random_batch(temperature=0.8), Policy(model, compile_layers=True)
    with nothing_said():
        for budget in (30, 1):
            assert_same(
                measure(policy, batch, direction, token_budget=budget), measure(Policy(model), batch, direction)
            )
    assert forms(policy) == len(graphs) == 2


@pytest.mark.slow
def test_the_compiler_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_for_real)
    model = random_model("llama")
    direction, batch, policy = everything(model), random_batch(temperature=0.8), Policy(model, compile_layers=True)
    with nothing_said():
        assert_same(measure(policy, batch, direction, token_budget=30), measure(Policy(model), batch, direction))
    with nothing_compiled_again():
        assert_same(measure(policy, batch, direction, token_budget=17), measure(Policy(model), batch, direction))
    assert forms(policy) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_compiler_itself_on_an_architecture(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_for_real)
    test_an_architecture(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_in_float64_to_its_rounding(name, graphs):
    model = random_model(name).double()
    batch, direction = random_batch(temperature=0.8), everything(model)
    with InFloat64(), nothing_said():
        expected = measure(Policy(model), batch, direction)
        policy = Policy(model, compile_layers=True)
        for budget in (30, 17):
            assert_same(measure(policy, batch, direction, token_budget=budget), expected, bar=1e-10)
    assert forms(policy) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_in_bfloat16_no_worse_than_uncompiled(name, graphs):
    """Against the same weights in float64: compiled rounds no more often."""
    model = random_model(name).bfloat16()
    batch, direction = random_batch(temperature=0.8), everything(model)
    plain = measure(Policy(model), batch, direction, token_budget=17)
    policy = Policy(model, compile_layers=True)
    with nothing_said():
        found = measure(policy, batch, direction, token_budget=17)
    assert forms(policy) > 0
    with InFloat64():
        exact = reference_columns(model.double(), batch, direction)
    for column, values in exact.items():
        error, usual = (np.linalg.norm(getattr(sums, column) - values) for sums in (found, plain))
        assert error <= 1.5 * usual, column


class TestWhatMoves:
    """Products with a tangent: ẋ W where x moves, x Ẇ where W does. A layer of llama has seven matrices."""

    def products(self, graph) -> int:
        return sum(node.target is mm for node in graph.graph.nodes)

    def check(self, model, direction, graphs, counts):
        batch, policy = random_batch(), Policy(model, compile_layers=True)
        with nothing_said():
            found = measure(policy, batch, direction, token_budget=17)
        assert_same(found, measure(Policy(model), batch, direction))
        assert [self.products(graph) for graph in graphs] == counts
        assert not any("attention_adjoint" in str(node.target) for graph in graphs for node in graph.graph.nodes)

    @pytest.mark.slow
    def test_everything(self, graphs):
        model = random_model("llama")
        self.check(model, everything(model), graphs, [21])

    @pytest.mark.slow
    def test_the_embedding_only(self, graphs):
        model = random_model("llama")
        self.check(model, random_direction(model, names=lambda name: "embed_tokens" in name), graphs, [14])

    @pytest.mark.slow
    def test_one_layer_only(self, graphs):
        """The layers before it have no tangent, its first products have none in x."""
        model = random_model("llama", num_hidden_layers=3)
        self.check(
            model, random_direction(model, names=lambda name: ".1." in name and "proj" in name), graphs, [7, 18, 14]
        )

    @pytest.mark.slow
    def test_adapters(self, graphs):
        model = with_lora(random_model("llama"), target_modules=["q_proj", "down_proj"])
        direction = random_direction(model, names=lambda name: "lora_" in name)
        batch, policy = random_batch(), Policy(model, compile_layers=True)
        with nothing_said():
            assert_same(measure(policy, batch, direction, token_budget=17), measure(Policy(model), batch, direction))
        first, second = (self.products(graph) for graph in graphs)
        # Primal: 7 of W, 4 of factors. Tangent in the first layer: x is still for q, k, v: of q's two factors 1 + 2 (ȧ,
        # then ḃ and b), W·ẋ for o, gate, up, down, and both rules for down's factors; in the second all have ẋ too.
        assert first == 11 + 3 + 4 + 4 and second == 11 + 4 + 7 + 4

    @pytest.mark.slow
    def test_only_the_active_adapter(self, graphs):
        """Which one that is stands in a list of each layer, its scaling in a dict."""
        settings = dict(target_modules=["q_proj", "down_proj"])
        model = with_lora(with_lora(random_model("llama"), "a", **settings), "b", seed=8, lora_alpha=32, **settings)
        direction = random_direction(model, names=lambda name: "lora_" in name)
        batch, policy = random_batch(), Policy(model, compile_layers=True)
        for adapter in ("b", "a"):
            model.set_adapter(adapter)
            with nothing_said():
                found = measure(policy, batch, direction, token_budget=17)
            assert_same(found, measure(Policy(model), batch, direction))
        assert forms(policy) == 4  # of each adapter one for the first layer, which x reaches without a tangent

    @pytest.mark.slow
    def test_nothing_and_elsewhere(self, graphs):
        """At eta != 0 there is no tangent; the weights there and θ itself use one form, whatever is frozen."""
        model = random_model("llama")
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        with nothing_said():
            for eta, frozen in ((0.0, False), (1e-2, True), (-1e-2, False)):
                model.model.layers[0].requires_grad_(not frozen)
                found = measure(policy, batch, direction, eta=eta, order=0, token_budget=17)
                assert_same(found, measure(Policy(model), batch, direction, eta=eta, order=0))
            assert len(graphs) == 1
            found = measure(policy, batch, direction, eta=1e-2, order=1, token_budget=17)
        assert_same(found, measure(Policy(model), batch, direction, eta=1e-2, order=1))
        assert [self.products(graph) for graph in graphs] == [7, 21]


class TestLayersThatLookAlike:
    @pytest.mark.slow
    def test_buffers_and_plain_tensors_are_the_layers_own(self, graphs):
        """One form for layers that differ in their buffers; new values and places do not become old ones."""
        model = random_model("llama")

        def add(layer, value):
            layer.register_buffer("bias", torch.full((32,), value))
            layer.extra = torch.full((32,), value)
            layer.forward = Shifted(layer)

        for layer, value in zip(model.model.layers, (0.3, -0.2)):
            add(layer, value)
        direction, batch = everything(model), random_batch()
        policy = Policy(model, compile_layers=True)
        for scale in (1.0, 5.0):
            for layer in model.model.layers:
                layer.bias, layer.extra = layer.bias * scale, layer.extra * scale
            with nothing_said():
                found = measure(policy, batch, direction, token_budget=17)
            assert_same(found, measure(Policy(model), batch, direction))

    @pytest.mark.slow
    def test_what_the_key_does_not_see_the_comparison_does(self, graphs):
        """Computing by one's place among the layers, which is no part of the key."""
        model = random_model("llama", num_hidden_layers=3)
        for layer in model.model.layers:
            layer.mlp.act_fn = ByPlace(layer.self_attn.layer_idx)
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        with pytest.warns(
            UserWarning, match="LlamaDecoderLayer compiled differs from uncompiled by .* goes on uncompi"
        ):
            found = measure(policy, batch, direction, token_budget=17)
        assert_same(found, measure(Policy(model), batch, direction))
        assert len(graphs) == 1 and [form is None for form in policy._compiled_layers._settled.values()] == [0, 1, 1]

    @pytest.mark.slow
    def test_settings_that_change_between_passes(self, graphs):
        model = random_model("llama")
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        for epsilon in (1e-6, 0.5):
            for layer in model.model.layers:
                layer.input_layernorm.variance_epsilon = epsilon
            with nothing_said():
                found = measure(policy, batch, direction, token_budget=17)
            assert_same(found, measure(Policy(model), batch, direction))
        assert len(graphs) == 2

    @pytest.mark.slow
    def test_dropout_is_off_and_modes_are_kept(self, graphs):
        model = random_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        model.train()
        expected = measure(Policy(model), batch, direction)
        for _ in range(2):
            assert_same(measure(policy, batch, direction, token_budget=17), expected)
        assert model.training


class Shifted:
    """A forward that was put on the instance."""

    def __init__(self, layer):
        self.layer, self.inner = layer, layer.forward

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs) + self.layer.bias * self.layer.extra


class ByPlace(torch.nn.Module):
    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x):
        return torch.nn.functional.silu(x) * (1 + self.layer_idx)


class TestRefusals:
    def settle(self, model, said, count=None):
        """Results are right, and said why they come from the uncompiled layers, once per make and not again."""
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = measure(policy, batch, direction, token_budget=17)
        assert_same(found, measure(Policy(model), batch, direction))
        messages = [str(w.message) for w in caught if "policy: " in str(w.message)]
        assert [said in message for message in messages] == [True] * (count or 1), messages
        assert forms(policy) == 0
        with nothing_said():
            assert_same(measure(policy, batch, direction, token_budget=17), found)

    @pytest.mark.parametrize(("name", "count"), [("mixtral", 1), pytest.param("gpt_oss", 2, marks=pytest.mark.slow)])
    def test_routing(self, name, count):
        self.settle(random_model(name), "DecoderLayer cannot be compiled (GuardOnDataDependentSymNode", count)

    @pytest.mark.slow
    @pytest.mark.parametrize("worth", [2.0, float("nan")])
    def test_a_wrong_form(self, worth, monkeypatch):
        def wrong(graph, **_settings):
            return lambda *inputs: [None if x is None else x * worth for x in graph(*inputs)]

        monkeypatch.setattr(torch, "compile", wrong)
        model = random_model("llama")
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        with pytest.warns(UserWarning, match="compiled differs from uncompiled by (1.0e[+]00|nan) of its norm"):
            found = measure(policy, batch, direction, token_budget=17)
        assert_same(found, measure(Policy(model), batch, direction))

    @pytest.mark.parametrize(
        "lost", ["tangent", *(pytest.param(x, marks=pytest.mark.slow) for x in ("output", "no tangent"))]
    )
    def test_a_form_that_loses_one_part(self, lost, monkeypatch):
        def wrong(graph, **_settings):
            changes = {
                "output": lambda x, t: (x + 1, t),
                "tangent": lambda x, t: (x, t * float("nan")),
                "no tangent": lambda x, t: (x, None),
            }
            return lambda *inputs: changes[lost](*graph(*inputs))

        monkeypatch.setattr(torch, "compile", wrong)
        model = random_model("llama")
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        with pytest.warns(UserWarning, match="compiled differs from uncompiled by"):
            found = measure(policy, batch, direction, token_budget=17)
        assert_same(found, measure(Policy(model), batch, direction))

    @pytest.mark.slow
    def test_a_branch_on_the_number_of_tokens(self):
        class Branch(torch.nn.Module):
            def forward(self, x):
                return torch.relu(x) if x.shape[-2] > 12 else torch.tanh(x)

        model = random_model("llama")
        for layer in model.model.layers:
            layer.mlp.act_fn = Branch()
        self.settle(model, "its graph would depend on the number of tokens")

    @pytest.mark.slow
    def test_a_layer_that_returns_more(self):
        model = random_model("llama")
        for layer in model.model.layers:
            layer.forward = Pair(layer.forward)
        model.model.forward = partial(of_pairs, model.model)
        self.settle(model, "it returns 2 values, expected one tensor", count=2)  # the forwards are two makes

    @pytest.mark.slow
    def test_a_layer_that_changes_a_buffer(self):
        class Counting(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("count", torch.zeros(1))

            def forward(self, x):
                self.count += 1
                return torch.relu(x)

        model = random_model("llama")
        for layer in model.model.layers:
            layer.mlp.act_fn = Counting()
        self.settle(model, "it changes its arguments or its buffers")

    @pytest.mark.slow
    def test_hooks(self):
        model, called = random_model("llama"), []
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *_: called.append(1))
        self.settle(model, "hooks on its modules would not run")
        assert called

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("no C++ compiler"),
            *(pytest.param(e, marks=pytest.mark.slow) for e in (TypeError("not a size"), AssertionError("no"))),
        ],
    )
    @pytest.mark.slow
    def test_whatever_the_compiler_raises_is_named(self, error, monkeypatch):
        def failing(_graph, **_settings):
            raise error

        monkeypatch.setattr(torch, "compile", failing)
        self.settle(random_model("llama"), f"cannot be compiled ({type(error).__name__}: {error})")

    @pytest.mark.slow
    def test_without_a_cpp_compiler(self, monkeypatch):
        from torch._inductor import config

        monkeypatch.setattr(torch, "compile", compile_for_real)
        with config.patch({"cpp.cxx": ("/nonexistent",), "force_disable_caches": True}):
            self.settle(random_model("llama"), "cannot be compiled (InductorError")

    def test_dora_and_models_without_a_list_of_layers(self):
        with pytest.raises(ValueError, match="compile_layers: True for a model with DoRA"):
            Policy(with_lora(random_model("llama"), use_dora=True), compile_layers=True)
        model = random_model("llama")
        model.model.layers = torch.nn.ModuleDict({str(i): layer for i, layer in enumerate(model.model.layers)})
        model.model.layers.__class__ = Unlisted
        with pytest.raises(ValueError, match="compile_layers: True for LlamaForCausalLM, which has no list of its 2"):
            Policy(model, compile_layers=True)


class Pair:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return out, out.detach()


def of_pairs(model, *args, **kwargs):
    """Runs a backbone whose layers return pairs."""
    own = [layer.forward for layer in model.layers]
    try:
        for layer, forward in zip(model.layers, own):
            layer.forward = lambda *a, forward=forward, **k: forward(*a, **k)[0]
        return type(model).forward(model, *args, **kwargs)
    finally:
        for layer, forward in zip(model.layers, own):
            layer.forward = forward


class Unlisted(torch.nn.ModuleDict):
    """Layers in no list; what a model asks of it works."""

    def __getitem__(self, index):
        return list(self.values())[index] if isinstance(index, slice) else super().__getitem__(index)


class TestOutOfMemory:
    @pytest.mark.parametrize("wrapped", [pytest.param(wrapped, marks=pytest.mark.slow) for wrapped in (False, True)])
    def test_in_the_first_compiled_run_halves_the_budget_and_is_no_verdict(self, wrapped, monkeypatch):
        left = [2]

        def short(graph, **_settings):
            def run(*inputs):
                if left[0]:
                    left[0] -= 1
                    shortage = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
                    if not wrapped:
                        raise shortage
                    raise RuntimeError("backend failed") from shortage
                return graph(*inputs)

            return run

        monkeypatch.setattr(torch, "compile", short)
        model = random_model("llama")
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = measure(policy, batch, direction, token_budget=60)
        messages = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
        assert ["out of memory, went on with" in message for message in messages] == [True], messages
        assert_same(found, measure(Policy(model), batch, direction))
        assert left == [0] and forms(policy) == 1


class TestInPlace:
    @pytest.mark.slow
    def test_forwards_are_put_back(self, graphs):
        model = random_model("llama")
        first, second = model.model.layers
        own = second.forward = Forwarding(second.forward)
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        with nothing_said():
            found = measure(policy, batch, direction, token_budget=17)
        assert_same(found, measure(Policy(model), batch, direction))
        assert "forward" not in vars(first) and second.forward is own
        with pytest.raises(ZeroDivisionError), policy.ready():
            assert "forward" in vars(first) and second.forward is not own
            raise ZeroDivisionError
        assert "forward" not in vars(first) and second.forward is own

    @pytest.mark.slow
    def test_a_layer_used_twice(self, graphs):
        model = random_model("llama")
        model.model.layers[1] = model.model.layers[0]
        direction, batch, policy = everything(model), random_batch(), Policy(model, compile_layers=True)
        with nothing_said():
            found = measure(policy, batch, direction, token_budget=17)
        assert_same(found, measure(Policy(model), batch, direction))
        assert "forward" not in vars(model.model.layers[0])

    def test_gradients_and_nested_forward_mode_are_uncompiled(self, graphs):
        model = random_model("llama")
        batch, policy = random_batch(reward=True), Policy(model, compile_layers=True)
        found, expected = (
            policy_gradient_direction(p, batch, step_size=1.0, optimizer="sgd") for p in (policy, Policy(model))
        )
        for name, v in expected.tensors.items():
            torch.testing.assert_close(found.tensors[name], v, rtol=0, atol=0)
        measure(policy, batch, everything(model), order=2, second_order="nested")
        assert not graphs

    @pytest.mark.slow
    def test_the_model_and_the_memory_are_left_as_found(self):
        """Nothing of a microbatch outlives it: neither its activations nor marks on the model's parameters."""
        model = random_model("llama", num_hidden_layers=1)
        direction, policy = everything(model), Policy(model, compile_layers=True)
        measure(policy, batch_of([23, 1]), direction)
        gc.collect()
        sizes = [tuple(x.shape) for x in gc.get_objects() if type(x) is torch.Tensor and not x.is_meta]
        assert not [size for size in sizes if 24 in size]
        assert not any(vars(p) for p in model.parameters())


class Forwarding:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.slow
def test_sizes_that_coincide_are_told_apart(graphs):
    """The first microbatch has as many tokens as the model is wide, or a head."""
    for name, totals in (("llama", [32]), ("gpt_neox", [4, 4])):
        model = random_model(name)
        direction, plain, policy = everything(model), Policy(model), Policy(model, compile_layers=True)
        with nothing_said():
            measure(policy, batch_of(totals), direction)
            for batch in (random_batch(3), batch_of([5, 1])):
                assert_same(measure(policy, batch, direction, token_budget=17), measure(plain, batch, direction))


def test_a_product_of_a_matrix_that_stays_and_one_that_moves():
    """`trace` by itself: J ẋ of a function of two arguments of which one moves, at sizes it was not traced at."""

    def function(integers, tensors):
        x, w = tensors
        return torch.tanh(x @ w) * integers[0]

    x, w, dx = torch.randn(5, 3), torch.randn(3, 4), torch.randn(5, 3)
    graph = trace.trace(function, [7], [x, w], [dx, None], [range(1), ()])
    assert sum(node.target is mm for node in graph.graph.nodes) == 2
    for n, k in ((5, 7), (9, 2)):
        x, dx = torch.randn(n, 3), torch.randn(n, 3)
        out, tangent = graph([k], [x, w], [dx])
        expected, dexpected = torch.func.jvp(lambda x: torch.tanh(x @ w) * k, (x,), (dx,))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(tangent, dexpected)


def test_plain_values_are_told_apart_and_objects_by_identity():
    value = layers._value
    assert value(partial(round, ndigits=2)) == value(partial(round, ndigits=2)) != value(partial(round, ndigits=3))
    assert value({"a": [1, None]}) == value({"a": [1, None]}) != value({"a": [1.0, None]})
    assert value(True) != value(1) and value(thing := object()) == value(thing) != value(object())
