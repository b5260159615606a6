"""PEFT models: adapters' weights are directions like any other, and the pass sees the adapted policy."""

import copy
import warnings

import numpy as np
import pytest
import torch
from models import InFloat64, random_batch, random_direction, random_model, with_lora

from dentropy import Direction, Policy, importance, measure, slope

COLUMNS = ("logp", "entropy", "dlogp", "dentropy", "entropy_to_go", "length_to_go")
TARGETS = {
    "queries and values": dict(target_modules=["q_proj", "v_proj"]),
    "every linear layer": dict(target_modules="all-linear", use_rslora=True),
    "head": dict(target_modules=["lm_head", "q_proj"]),
    "embedding": dict(target_modules=["embed_tokens", "v_proj"]),
    "norms and head saved whole": dict(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
}


def trained(model) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def direction_of(model, names) -> Direction:
    return random_direction(model, names=lambda name: name in names)


def merged(model, direction=None, eta=0.0):
    """A plain model with the adapted weights at θ + η·v."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, v in direction.tensors.items() if direction else ():
            model.get_parameter(name).add_(v, alpha=eta)
    return model.merge_and_unload()


def assert_same(sums, expected, rel=1e-9):
    for column in COLUMNS:
        a, b = getattr(sums, column), getattr(expected, column)
        assert np.abs(a - b).max() <= rel * np.abs(b).max(), column


@pytest.mark.filterwarnings("ignore:policy. its head is not a plain matrix")
@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_have_the_derivatives_of_the_merged_weights(targets):
    """(B + Ḃ)(A + Ȧ) − (B − Ḃ)(A − Ȧ) = 2(ḂA + BȦ): half of it is the direction of the merged weights, exactly."""
    model = with_lora(random_model("llama"), **TARGETS[targets]).double()
    direction, batch = direction_of(model, trained(model)), random_batch(temperature=0.8)
    plain = merged(model)
    whole = Direction.between(merged(model, direction, -1.0), merged(model, direction, 1.0), step_size=2.0)
    assert set(whole.tensors) <= {name for name, _ in random_model("llama").named_parameters()}
    with InFloat64():
        assert_same(measure(Policy(model), batch, direction), measure(Policy(plain), batch, whole))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("llama", dict(use_dora=True)),
        ("llama", dict(use_dora=True, target_modules=["embed_tokens", "q_proj"])),
        ("mixtral", {}),
    ],
    ids=["DoRA", "DoRA on the embedding", "experts"],
)
def test_slopes_are_central_differences_of_the_measurement(name, settings):
    """DoRA detaches its norm in training; that it moves with the weights is part of what an update does."""
    model = with_lora(random_model(name), **settings).double()
    direction, batch, step = direction_of(model, trained(model)), random_batch(), 1e-5
    with InFloat64():
        policy = Policy(model)
        base = measure(policy, batch, direction)
        plus, minus = (measure(policy, batch, direction, eta=eta) for eta in (step, -step))
    difference = (importance(base, plus).delta - importance(base, minus).delta) / (2 * step)
    assert slope(base, estimator="exact").value == pytest.approx(difference, rel=1e-6)
    assert policy.packs and policy.splits_head


def test_what_a_pass_needs_of_dora_ends_with_it():
    model = with_lora(random_model("llama"), use_dora=True)
    policy, inside = Policy(model), []
    x = torch.ones(2, requires_grad=True)
    with policy.ready():
        inside.append((x * 2).detach().requires_grad)
    assert inside == [True] and not (x * 2).detach().requires_grad


def test_only_the_active_adapter_moves():
    model = with_lora(random_model("llama"), "first")
    model = with_lora(model, "second", seed=6, target_modules=["q_proj", "up_proj"]).double()
    adapters = {key: [n for n, _ in model.named_parameters() if f".{key}." in n] for key in ("first", "second")}
    both, batch = direction_of(model, [*adapters["first"], *adapters["second"]]), random_batch()
    only = {key: Direction({name: both.tensors[name] for name in names}) for key, names in adapters.items()}
    with InFloat64():
        policy = Policy(model)
        for active, idle in (("second", "first"), ("first", "second")):
            model.set_adapter(active)
            assert_same(measure(policy, batch, both), measure(policy, batch, only[active]), rel=0)
            still = measure(policy, batch, only[idle])
            assert not still.dlogp.any() and not still.dentropy.any() and still.entropy.any()
        model.base_model.set_adapter(["first", "second"])
        parts = [measure(policy, batch, v) for v in only.values()]
        assert parts[0].dlogp.any() and parts[1].dlogp.any()
        whole = measure(policy, batch, both)
        np.testing.assert_allclose(whole.dlogp, parts[0].dlogp + parts[1].dlogp, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, dict(modules_to_save=["lm_head"])], ids=["LoRA", "head saved whole"])
def test_a_disabled_adapter_is_the_base_model(settings):
    model, batch = with_lora(random_model("llama"), **settings), random_batch()
    policy, direction = Policy(model), direction_of(model, trained(model))
    adapted, base = measure(policy, batch, direction), measure(Policy(random_model("llama")), batch)
    assert adapted.dlogp.any() and np.abs(adapted.logp - base.logp).max() > 1e-2
    with model.disable_adapter():
        disabled = measure(policy, batch, direction)
        assert Policy(model).splits_head
    assert np.array_equal(disabled.logp, base.logp) and not disabled.dlogp.any()
    assert np.array_equal(measure(policy, batch, direction).logp, adapted.logp)


def test_a_trained_copy_of_the_head_is_split_off_in_bf16_too():
    model = with_lora(random_model("llama"), modules_to_save=["lm_head", "embed_tokens"]).to(torch.bfloat16)
    head = model.get_base_model().lm_head
    torch.nn.init.normal_(head.modules_to_save["default"].weight, std=0.2)
    policy = Policy(model)
    assert policy.splits_head and policy.head().weight is head.modules_to_save["default"].weight
    with model.disable_adapter():
        assert policy.head().weight is head.original_module.weight


def test_lora_on_the_head_goes_through_the_models_own_and_needs_float32():
    model = with_lora(random_model("llama"), target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="own head"):
        assert not Policy(model).splits_head
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        Policy(model.to(torch.bfloat16))


def test_an_optimizers_step_on_adapters_is_a_direction():
    model = with_lora(random_model("llama"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(3, 15).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    direction = Direction.from_optimizer_step(model, optimizer)
    assert set(direction.tensors) == set(trained(model))
    policy, batch = Policy(model), random_batch()
    foreseen = measure(policy, batch, direction, eta=direction.step_size)
    optimizer.step()
    np.testing.assert_allclose(measure(policy, batch).logp, foreseen.logp, rtol=1e-5, atol=1e-5)


def test_building_a_policy_on_adapters_says_nothing():
    model = with_lora(random_model("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Policy(model)
