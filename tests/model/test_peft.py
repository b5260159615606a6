"""PEFT models: adapters' weights are directions like any other, and the pass sees the adapted policy."""

import copy
import warnings

import numpy as np
import pytest
import torch
from models import SAVED_MODULES_LOAD, InFloat64, random_batch, random_direction, random_model, with_lora

from dentropy import Direction, PackedBatch, Policy, importance, measure, policy_gradient_direction, slope

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
            with pytest.raises(ValueError, match=f"direction: moves only .*.adapter '{idle}' is not active"):
                measure(policy, batch, only[idle])
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
        disabled = measure(policy, batch)
        assert Policy(model).splits_head
        with pytest.raises(ValueError, match="adapter 'default' is disabled.*enable_adapters"):
            measure(policy, batch, direction)
    assert np.array_equal(disabled.logp, base.logp)
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


def test_what_an_adapter_stands_for_is_idle_and_so_is_one_that_was_merged():
    model, batch = with_lora(random_model("llama"), modules_to_save=["lm_head"]), random_batch()
    policy = Policy(model)
    replaced = direction_of(model, ["base_model.model.lm_head.original_module.weight"])
    with pytest.raises(ValueError, match="an adapter's copy stands in their place"):
        measure(policy, batch, replaced)
    both = direction_of(model, [*replaced.tensors, "base_model.model.lm_head.modules_to_save.default.weight"])
    assert measure(policy, batch, both).dlogp.any()
    model = with_lora(random_model("llama"))
    direction = direction_of(model, trained(model))
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter 'default' is merged into the weights.*unmerge_adapter"):
        measure(Policy(model), batch, direction)


@pytest.fixture
def adapter_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    random_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = with_lora(base, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


@pytest.mark.skipif(not SAVED_MODULES_LOAD, reason="this transformers does not load modules_to_save")
def test_an_adapter_folder_is_a_policy_whose_adapter_an_update_moves(adapter_folder):
    folder, model = adapter_folder
    policy, batch = Policy.from_pretrained(folder, device="cpu"), random_batch(reward=True)
    assert np.array_equal(measure(policy, batch).logp, measure(Policy(model), batch).logp)
    for optimizer in ("sgd", "adamw"):
        found = policy_gradient_direction(policy, batch, step_size=1e-3, optimizer=optimizer)
        expected = policy_gradient_direction(Policy(model), batch, step_size=1e-3, optimizer=optimizer)
        assert len(found.tensors) == len(expected.tensors) == len(trained(model))
        for name, v in found.tensors.items():
            torch.testing.assert_close(v, expected.tensors[f"base_model.model.{name}"])
        assert measure(policy, batch, found).dlogp.any()


def peft_model(config):
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(random_model("llama"), config(peft)).eval()


@pytest.mark.parametrize(
    "config",
    [
        lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda peft: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"],
)
def test_soft_prompts_are_named_as_such(config, request):
    with pytest.raises(ValueError, match=f"model: soft prompts .{request.node.callspec.id}"):
        Policy(peft_model(config))


def test_an_adapter_that_waits_for_an_invocation_is_found_on_rollouts_that_have_one():
    model = peft_model(
        lambda peft: peft.LoraConfig(
            task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], init_lora_weights=False, target_modules="all-linear"
        )
    )
    policy = Policy(model)
    with pytest.raises(ValueError, match="adapters of kind aLoRA, whose effect may depend on the input: its own forw"):
        measure(policy, PackedBatch.from_lists([[9, 5, 6]] * 2, [[7, 8], [9]]))
