"""What a policy is: its weights, its head, the settings of a pass, and what it refuses to wrap."""

import pytest
import torch
from models import LLAMA_LIKE, random_batch, random_direction, random_model
from torch import nn

from dentropy import Policy, measure


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


def test_an_attention_without_forward_mode_names_the_fix():
    model = random_model("llama")

    class Flash(nn.Module):
        def forward(self, hidden_states, **_):
            x = hidden_states[:, None]
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0], None

    model.model.layers[0].self_attn = Flash()
    says, names = pytest.warns(UserWarning, match="one at a time"), pytest.raises(ValueError, match="='eager'")
    with says, names:
        Policy(model)


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


def test_a_policy_follows_its_model():
    model = random_model("llama")
    policy = Policy(model)
    model.double()
    assert policy.dtype == torch.float64
    model.lm_head.__class__ = type("NoisyHead", (nn.Linear,), {})
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
