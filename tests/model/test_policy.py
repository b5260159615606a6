import warnings

import pytest
import torch
from models import CONFIGS, LLAMA_LIKE, random_batch, random_direction, random_model
from torch import nn

from dentropy import PackedBatch, Policy, measure


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "mamba2"])
def test_known_architectures_pack_and_split_their_head(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        policy = Policy(random_model(name))
    assert policy.packs and policy.splits_head and policy.vocab_size == 40


def test_a_model_that_cannot_be_packed_says_so():
    with pytest.warns(UserWarning, match="one at a time"):
        policy = Policy(random_model("mamba2"))
    assert not policy.packs and policy.splits_head


class NoisyHead(nn.Linear):
    """A head that is more than a matrix product: nothing about it can be read from a weight."""

    def forward(self, x):
        return super().forward(x) + 0.1 * super().forward(x).sin()


def test_an_unusual_head_goes_through_the_models_own_logits():
    model = random_model("llama")
    plain = measure(Policy(model), random_batch(), random_direction(model))
    model.lm_head.__class__ = NoisyHead
    with pytest.warns(UserWarning, match="own head"):
        policy = Policy(model)
    assert policy.packs and not policy.splits_head
    step, batch, direction = 1e-3, random_batch(), random_direction(model)
    sums = measure(policy, batch, direction)
    plus, minus = measure(policy, batch, direction, eta=step), measure(policy, batch, direction, eta=-step)
    difference = (plus.entropy - minus.entropy) / (2 * step)
    assert abs(sums.dentropy - difference).max() < 2e-3 * abs(difference).max()
    assert abs(sums.entropy - plain.entropy).max() > 1e-3


def test_an_unusual_head_in_half_precision_is_refused():
    model = random_model("llama").to(torch.bfloat16)
    model.lm_head.__class__ = NoisyHead
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        Policy(model)


class Mixes(nn.Module):
    """Stands in for a layer that mixes positions: those before, in a way packed rows cannot follow, or all of them."""

    def __init__(self, inner, mixed):
        super().__init__()
        self.inner, self.mixed = inner, mixed

    def forward(self, x):
        return self.inner(x) + self.mixed(x)


def test_mixing_across_a_packed_row_is_found():
    model = random_model("llama")
    model.model.layers[0].mlp = Mixes(model.model.layers[0].mlp, lambda x: x.cumsum(1))
    with pytest.warns(UserWarning, match="one at a time"):
        assert not Policy(model).packs


def test_models_that_see_later_tokens_are_refused():
    """As Doge's mixture of experts does, whose router takes [tokens, 2] for [2, tokens]."""
    model = random_model("llama")
    model.model.layers[1].mlp = Mixes(model.model.layers[1].mlp, lambda x: x.mT.reshape(x.shape))
    with pytest.raises(ValueError, match="policy: llama: logits of a position change with the tokens after it"):
        Policy(model)
    with pytest.warns(UserWarning, match="unless torch.bfloat16 is to blame"):
        Policy(model.to(torch.bfloat16))


def test_biases_of_the_head_are_read():
    model = random_model("llama")
    model.lm_head = nn.Linear(32, 40, bias=True)
    nn.init.normal_(model.lm_head.bias)
    policy = Policy(model)
    assert policy.splits_head and policy.head().bias is model.lm_head.bias
    direction = random_direction(model, names=lambda name: name == "lm_head.bias")
    step = 1e-2
    sums = measure(policy, random_batch(), direction)
    plus, minus = (measure(policy, random_batch(), direction, eta=eta) for eta in (step, -step))
    difference = (plus.entropy - minus.entropy) / (2 * step)
    assert abs(sums.dentropy - difference).max() < 1e-3 * abs(difference).max()


def test_parts_with_attention_of_their_own_get_it_back():
    """The text of a multimodal model runs eagerly where the rest uses SDPA, and the reverse."""
    import transformers

    text = LLAMA_LIKE | dict(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=39,
            boi_token_index=37,
            eoi_token_index=38,
        )
    )
    direction, measured = random_direction(model, names=lambda name: "language_model" in name), []
    for whole, part in (("sdpa", "eager"), ("eager", "sdpa")):
        model.set_attn_implementation({"": whole, "vision_config": whole, "text_config": part})
        policy = Policy(model)
        measured.append(measure(policy, random_batch(), direction))
        assert policy.packs and policy.splits_head
        parts = (model.config, model.config.vision_config, model.config.text_config)
        assert [config._attn_implementation for config in parts] == [whole, whole, part]
    assert (measured[0].dentropy == measured[1].dentropy).all() and measured[0].dentropy.any()


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_unusable_models_name_the_fix():
    model = random_model("llama")
    with pytest.raises(ValueError, match="pass model.module"):
        Policy(Wrapper(model))
    with pytest.raises(ValueError, match="expected a causal language model"):
        Policy(nn.Linear(2, 2))
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantiz"):
        Policy(model)


def test_weights_that_are_not_finite_are_named():
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="weights that are not finite in model.layers.1.mlp.up_proj.weight"):
        Policy(model)


def test_an_attention_without_forward_mode_names_the_fix():
    model = random_model("llama")
    policy = Policy(model)

    class Flash(nn.Module):
        def forward(self, hidden_states, **_):
            x = hidden_states[:, None]
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0], None

    model.model.layers[0].self_attn = Flash()
    direction = random_direction(model, names=lambda name: "embed" in name)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        measure(policy, random_batch(), direction)


def test_checkpoints_load_in_float32_and_missing_ones_are_bad_input(tmp_path):
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "policy")
    assert Policy.from_pretrained(tmp_path / "policy", device="cpu").dtype == torch.float32
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        Policy.from_pretrained(tmp_path / "nowhere")


def test_autocast_and_inference_mode_around_a_pass_change_nothing():
    model = random_model("llama")
    policy, batch, direction = Policy(model), random_batch(), random_direction(model)
    plain = measure(policy, batch, direction)
    for surroundings in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with surroundings:
            assert (measure(policy, batch, direction).dentropy == plain.dentropy).all()
    with torch.inference_mode():
        sealed = random_model("llama")
    with pytest.raises(ValueError, match="inference_mode"):
        Policy(sealed)


@pytest.mark.parametrize(
    "config, settings",
    [
        ("PhimoeConfig", dict(sliding_window=16, num_local_experts=4)),
        (
            "Phi3Config",
            dict(
                original_max_position_embeddings=20,
                rope_parameters=dict(
                    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4
                ),
            ),
        ),
    ],
    ids=["a window in the mask alone", "rope by the longest of the row"],
)
def test_models_packing_would_change_run_one_sequence_at_a_time(config, settings):
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(LLAMA_LIKE | settings)))
    with pytest.warns(UserWarning, match="one at a time"):
        policy = Policy(model)
    batch = PackedBatch.from_lists([[5], [6]], [[7, 9, 4] * 13, [8, 9, 10]])
    whole, alone = (measure(policy, batch, token_budget=budget) for budget in (4096, 1))
    assert abs(whole.logp - alone.logp).max() < 1e-4
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.tensor([batch.prompt(0) + batch.response(0)[:-1]])
        logp = torch.log_softmax(model.eval()(input_ids=ids, use_cache=False).logits[0], -1)
    expected = logp.gather(-1, torch.tensor(batch.response(0))[:, None]).sum()
    assert whole.logp[0] == pytest.approx(float(expected), abs=1e-3)


def test_a_policy_follows_its_model():
    model = random_model("llama")
    policy = Policy(model)
    model.double()
    assert policy.dtype == torch.float64
    model.lm_head.__class__ = NoisyHead
    with pytest.raises(ValueError, match="make the Policy again"):
        measure(policy, random_batch())


def test_checkpoints_with_tensors_missing_or_left_over_are_refused(tmp_path):
    """transformers would fill the one with random numbers and drop the other."""
    from safetensors.torch import load_file, save_file

    random_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    taken = tensors.pop("model.layers.0.mlp.gate_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing tensors .model.layers.0.mlp.gate_proj.weight"):
        Policy.from_pretrained(tmp_path)
    left_over = {"model.layers.0.mlp.gate_proj.weight": taken, "model.layers.0.extra.weight": taken.clone()}
    save_file(tensors | left_over, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected tensors .model.layers.0.extra.weight"):
        Policy.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="policy: .* could not be loaded"):
        Policy.from_pretrained(tmp_path)
