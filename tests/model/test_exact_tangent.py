"""The self-check's other half: a tangent that does not arrive is found at construction, and named."""

import copy
import warnings

import pytest
import torch
from models import CONFIGS, quiet_fallback, random_batch, random_direction, random_model, with_lora
from torch import nn

from dentropy import Policy, measure


class AroundAutograd(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.data)


class Norm(nn.Module):
    """LLaMA's, with one half of its weight detached: the value is right and the derivative is half of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, x):
        weight = (self.weight + self.weight.detach()) / 2
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.inner.variance_epsilon)


class OfCopies(nn.Module):
    """Runs copies of the weights and shows the weights, as engines do that take them over at a step."""

    def __init__(self, model):
        super().__init__()
        self.model, self.copy = model, [copy.deepcopy(model)]

    def get_base_model(self):
        return self.copy[0]


class WrongJvp(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, dx):
        return 2 * dx


class NoJvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


class Through(nn.Module):
    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function.apply(self.inner(x))


def in_layer(i, place, make):
    def change(model):
        owner, _, name = place.rpartition(".")
        owner = model.model.layers[i].get_submodule(owner)
        setattr(owner, name, make(getattr(owner, name)))

    return change


def of_class(kind):
    def change(module):
        module.__class__ = kind
        return module

    return change


LOST = {
    "a product around autograd": (
        in_layer(0, "self_attn.q_proj", of_class(AroundAutograd)),
        "layers.0.*AroundAutograd",
    ),
    "in one layer alone": (in_layer(1, "mlp.down_proj", of_class(AroundAutograd)), "layers.1.mlp.down_proj.weight"),
    "half of a norm": (in_layer(1, "input_layernorm", Norm), "layers.1.input_layernorm.*Norm"),
    "a wrong jvp": (in_layer(1, "mlp.up_proj", lambda inner: Through(inner, WrongJvp)), "layers.1.mlp.up_proj"),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_derivative_that_is_wrong_is_found_and_named(kind):
    change, named = LOST[kind]
    model = random_model("llama")
    change(model)
    with pytest.raises(ValueError, match=f"policy: derivatives along .*{named}.* reads weights around autograd"):
        Policy(model)


def test_a_head_around_autograd_is_found():
    model = random_model("llama")
    model.lm_head.__class__ = AroundAutograd
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="derivatives along lm_head.weight .*AroundAutograd"):
            Policy(model)


def test_weights_that_nothing_reads_are_found():
    model = random_model("llama")
    wrapper = OfCopies(model)
    wrapper.config, wrapper.get_input_embeddings = model.config, model.get_input_embeddings
    wrapper.forward = wrapper.copy[0].forward
    with pytest.raises(ValueError, match="policy: no parameter of OfCopies has an effect on its logits"):
        Policy(wrapper)


def test_a_custom_function_without_jvp_is_named_as_such():
    model = random_model("llama")
    in_layer(1, "mlp", lambda inner: Through(inner, NoJvp))(model)
    with pytest.raises(ValueError, match="policy: LlamaForCausalLM: a custom autograd function without a jvp"):
        Policy(model)


def test_adapters_with_a_custom_function_are_named_by_kind():
    import peft

    config = peft.LoHaConfig(r=4, init_weights=False, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="policy: adapters of kind LOHA: a custom autograd function without a jvp"):
        Policy(peft.get_peft_model(random_model("llama"), config))


def test_what_no_update_moves_need_not_move():
    """Hra's base weights are read around autograd, and frozen; its own are not."""
    import peft

    config = peft.HRAConfig(r=4, init_weights=False, target_modules=["q_proj"])
    model = peft.get_peft_model(random_model("llama"), config).eval()
    direction = random_direction(model, names=lambda name: model.get_parameter(name).requires_grad)
    policy, batch, step = Policy(model), random_batch(), 1e-3
    plus, minus = (measure(policy, batch, direction, eta=eta).entropy for eta in (step, -step))
    difference = (plus - minus) / (2 * step)
    assert abs(measure(policy, batch, direction).dentropy - difference).max() < 1e-2 * abs(difference).max()


@quiet_fallback
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_right_passes_whatever_is_zero_or_constant_in_it(name):
    """Fresh biases are zero, fresh norms one, and rows of padding zero; experts chosen by rank jump."""
    Policy(random_model(name))
    Policy(random_model(name, seed=3).double())


def test_fresh_adapters_half_of_which_are_zero_pass():
    model = with_lora(random_model("llama"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(p)
    Policy(model)


def test_one_group_at_a_time_where_memory_asks_for_it(monkeypatch):
    monkeypatch.setattr("dentropy.model.exact_tangent.AT_ONCE", 1)
    model = random_model("llama")
    in_layer(0, "mlp.up_proj", of_class(AroundAutograd))(model)
    with pytest.raises(ValueError, match="derivatives along model.layers.0.mlp.up_proj.weight are not"):
        Policy(model)


def test_the_model_is_left_as_found():
    model = random_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    Policy(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert measure(Policy(model), random_batch(), random_direction(model)).dlogp.any()
