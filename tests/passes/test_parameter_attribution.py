import pytest
import torch
from crosses import crossed
from models import SCALED, InFloat64, random_batch, random_direction, random_model

from dentropy import PackedBatch, Policy, measure, slope
from dentropy.passes.parameter_attribution import by_kind, by_layer, parameter_attribution


@crossed(
    lambda name, estimator, per: name == "llama" or (estimator, per) == ("causal", "token"),
    name=["llama", "qwen2", "gpt2", *SCALED],
    estimator=["causal", "exact", "mixed"],
    per=["token", "sequence"],
)
def test_shares_add_up_to_the_forward_mode_slope(name, estimator, per):
    model = random_model(name).double()
    batch, direction = random_batch(temperature=0.8), random_direction(model)
    with InFloat64():
        policy = Policy(model)
        sums = measure(policy, batch, direction, keep_tokens=True)
        shares = parameter_attribution(policy, batch, direction, sums, estimator=estimator, per=per, token_budget=30)
    expected = slope(sums, estimator=estimator, per=per).value
    assert sum(shares.values()) == pytest.approx(expected, abs=1e-10 * sum(map(abs, shares.values())))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_shares_add_up_in_float32(name):
    model = random_model(name)
    batch, direction, policy = random_batch(), random_direction(model), Policy(model)
    sums = measure(policy, batch, direction, keep_tokens=True)
    shares = parameter_attribution(policy, batch, direction, sums)
    assert abs(sum(shares.values()) - slope(sums).value) <= 1e-5 * sum(map(abs, shares.values()))


def test_tokens_of_the_padding_row_count_too():
    """A policy can generate its padding token, and an update can move that row."""
    model = random_model("llama")
    batch = PackedBatch.from_lists([[3, 4]] * 3, [[0, 5, 0], [6, 0], [0, 0, 7]])
    direction = random_direction(model, names=lambda name: "embed" in name)
    policy = Policy(model)
    sums = measure(policy, batch, direction, keep_tokens=True)
    shares = parameter_attribution(policy, batch, direction, sums)
    assert shares["model.embed_tokens.weight"] == pytest.approx(slope(sums).value, rel=1e-4)
    assert model.model.embed_tokens.padding_idx == 0


def test_a_share_is_the_slope_along_that_parameter_alone():
    model = random_model("llama").double()
    batch, direction = random_batch(), random_direction(model)
    with InFloat64():
        policy = Policy(model)
        shares = parameter_attribution(policy, batch, direction, measure(policy, batch, direction, keep_tokens=True))
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
            alone = random_direction(model, names=lambda n, name=name: n == name)
            alone.tensors[name] = direction.tensors[name]
            assert slope(measure(policy, batch, alone)).value == pytest.approx(shares[name], rel=1e-9)


def test_shares_are_grouped_by_layer_and_by_kind():
    shares = {
        "model.embed_tokens.weight": 1.0,
        "model.layers.0.self_attn.q_proj.weight": 2.0,
        "model.layers.0.mlp.up_proj.weight": 4.0,
        "model.layers.11.mlp.up_proj.weight": 8.0,
        "transformer.h.3.attn.c_attn.bias": 16.0,
        "lm_head.weight": 32.0,
    }
    assert by_layer(shares) == {
        "model.embed_tokens": 1.0,
        "layer 0": 6.0,
        "layer 11": 8.0,
        "layer 3": 16.0,
        "lm_head": 32.0,
    }
    assert by_kind(shares) == {
        "model.embed_tokens": 1.0,
        "self_attn.q_proj": 2.0,
        "mlp.up_proj": 12.0,
        "attn.c_attn": 16.0,
        "lm_head": 32.0,
    }


def test_kept_tokens_are_needed():
    model = random_model("llama")
    batch, direction, policy = random_batch(), random_direction(model), Policy(model)
    with pytest.raises(ValueError, match="keep_tokens=True"):
        parameter_attribution(policy, batch, direction, measure(policy, batch, direction))
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()
