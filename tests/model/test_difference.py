"""What of two checkpoints is an update: weights under any of their names, no other state, no constants."""

import copy

import pytest
import torch
from models import SAVED_MODULES_LOAD, random_batch, random_direction, random_model, with_lora
from safetensors.torch import load_file, save_file

from dentropy import Direction, Policy, measure
from dentropy.model.checkpoint import load_checkpoint

ROUTED = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
)
ROUTER = "model.layers.1.mlp.gate.e_score_correction_bias"


def moved(model, scale=1e-2):
    after = copy.deepcopy(model)
    with torch.no_grad():
        for p in after.parameters():
            p += scale * torch.randn_like(p)
    return after


class TestOtherState:
    @pytest.fixture(scope="class")
    def router(self):
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        torch.manual_seed(0)
        return DeepseekV3ForCausalLM(DeepseekV3Config(**ROUTED))

    def test_a_routers_bias_that_differs_is_refused_by_name(self, router, tmp_path):
        after = moved(router)
        assert ROUTER not in Direction.between(router, after, 1.0).tensors
        after.get_buffer(ROUTER).add_(0.5)
        after.save_pretrained(tmp_path / "after")
        router.save_pretrained(tmp_path / "before")
        for sides in (
            (router, after),
            (router.state_dict(), after),
            (router, after.state_dict()),
            (tmp_path / "before", tmp_path / "after"),
        ):
            with pytest.raises(ValueError, match=f"after: {ROUTER}, a buffer and no parameter, differs"):
                Direction.between(*sides, 1.0)
        weights = dict(after.named_parameters())
        with pytest.raises(ValueError, match=f"after: 1 buffers are missing .{ROUTER}"):
            Direction.between(router, weights, 1.0)

    def test_one_from_state_dicts_is_refused_by_the_policy(self, router):
        after = moved(router)
        after.get_buffer(ROUTER).add_(0.5)
        direction = Direction.between(router.state_dict(), after.state_dict(), 1.0)
        with pytest.raises(ValueError, match=f"{ROUTER} is a buffer of it, which a direction cannot move"):
            direction.on(router)

    def test_whole_numbers_that_differ_are_refused(self):
        before = {"w": torch.ones(2), "count": torch.tensor(3)}
        with pytest.raises(ValueError, match="after: count is torch.int64 and differs"):
            Direction.between(before, {"w": torch.zeros(2), "count": torch.tensor(4)}, 1.0)

    def test_a_dict_around_a_state_dict_is_named(self):
        with pytest.raises(ValueError, match="before: a dict around others .model."):
            Direction.between({"model": {"w": torch.ones(2)}, "step": 3}, {"w": torch.ones(2)}, 1.0)


class TestConstants:
    def test_those_of_old_checkpoints_are_left_out(self, tmp_path):
        for name, constants in (
            ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
            (
                "gpt2",
                {
                    "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril(),
                    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
                },
            ),
        ):
            before = random_model(name)
            after = moved(before)
            plain = Direction.between(before, after, 1.0)
            before.save_pretrained(tmp_path / name)
            old = load_file(tmp_path / name / "model.safetensors") | constants
            save_file(old, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
            for side in (tmp_path / name, before.state_dict() | constants):
                found = Direction.between(side, after, 1.0).tensors
                assert all(torch.equal(v, found[n]) for n, v in plain.tensors.items())
                assert not set(found) & set(constants)
            assert load_checkpoint(tmp_path / name, "policy", torch.float32) is not None

    def test_another_rotary_base_is_another_model(self, tmp_path):
        before = random_model("llama")
        other = random_model("llama", rope_parameters=dict(rope_type="default", rope_theta=500.0))
        other.load_state_dict(moved(before).state_dict())
        with pytest.raises(ValueError, match="after: model.rotary_emb.inv_freq, a buffer"):
            Direction.between(before, other, 1.0)
        rounded = moved(before).to(torch.bfloat16)  # its frequencies too
        assert Direction.between(before, rounded, 1.0).tensors


def test_minus_infinity_on_both_sides_is_no_difference():
    bias = torch.tensor([0.5, -torch.inf, -torch.inf])
    before = {"lm_head.bias": bias, "w": torch.ones(2)}
    after = {"lm_head.bias": bias + 1.0, "w": torch.ones(2)}
    assert Direction.between(before, after, 0.5).tensors["lm_head.bias"].tolist() == [2.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="lm_head.bias has values that are not finite"):
        Direction.between(before, after | {"lm_head.bias": torch.zeros(3)}, 0.5)


class TestAdapters:
    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory):
        """A base model in bf16, and float32 adapters on it a small step apart, as training leaves them."""
        place = tmp_path_factory.mktemp("adapters")
        random_model("llama").to(torch.bfloat16).save_pretrained(place / "base")
        for name in ("a", "b", "wide"):
            base = load_checkpoint(place / "base", "policy", torch.bfloat16)
            settings = dict(r=8) if name == "wide" else {}
            model = with_lora(base, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], **settings)
            model = model.float()
            if name == "b":
                torch.manual_seed(3)
                with torch.no_grad():
                    for p in model.parameters():
                        if p.requires_grad:
                            p += 1e-4 * torch.randn_like(p)
            model.save_pretrained(place / name)
        return place

    def truth(self, place):
        a, b = (load_file(place / name / "adapter_model.safetensors") for name in ("a", "b"))
        return {name: (b[name].double() - a[name].double()) / 1e-4 for name in a}

    def test_the_files_are_compared_in_their_own_dtype(self, place):
        direction = Direction.between(place / "a", place / "b", 1e-4)
        truth = self.truth(place)
        assert set(direction.tensors) == set(truth)
        for name, v in direction.tensors.items():
            assert float((v.double() - truth[name]).norm() / truth[name].norm()) < 1e-5, name

    @pytest.mark.skipif(not SAVED_MODULES_LOAD, reason="this transformers does not load modules_to_save")
    def test_one_direction_fits_a_wrapped_policy_and_one_from_disk(self, place, tmp_path):
        import peft

        loaded = Policy.from_pretrained(place / "a", device="cpu")
        base = load_checkpoint(place / "base", "policy", torch.float32)
        wrapped = Policy(peft.PeftModel.from_pretrained(base, place / "a", adapter_name="task"))
        from_files = Direction.between(place / "a", place / "b", 1e-4)
        on_loaded, on_wrapped = self.of(loaded.model, from_files), self.of(wrapped.model, from_files)
        assert len(on_loaded) == len(on_wrapped) == len(from_files.tensors)
        Direction(on_wrapped, 1e-4).save(tmp_path / "wrapped.safetensors")
        Direction(on_loaded, 1e-4).save(tmp_path / "loaded.safetensors")
        batch = random_batch()
        expected = measure(loaded, batch, Direction(on_loaded)).dlogp
        assert abs(expected).max() > 0
        for policy in (loaded, wrapped):
            for saved in ("wrapped", "loaded"):
                direction = Direction.load(tmp_path / f"{saved}.safetensors")
                assert abs(measure(policy, batch, direction).dlogp - expected).max() <= 1e-4 * abs(expected).max()

    def of(self, model, direction):
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: v for p, v in direction.on(model)}

    @pytest.mark.skipif(not SAVED_MODULES_LOAD, reason="this transformers does not load modules_to_save")
    def test_a_model_with_the_adapter_may_be_either_side(self, place):
        files = Direction.between(place / "a", place / "b", 1e-4).tensors
        model = load_checkpoint(place / "a", "policy", torch.float32)
        mixed = Direction.between(model, place / "b", 1e-4)
        assert len(mixed.tensors) == len(files)
        mixed, files = self.of(model, mixed), self.of(model, Direction(files, 1e-4))
        assert all(torch.equal(v, mixed[name]) for name, v in files.items())

    @pytest.mark.skipif(not SAVED_MODULES_LOAD, reason="this transformers does not load modules_to_save")
    def test_an_adapter_after_its_base_is_what_merging_adds(self, place):
        direction = Direction.between(place / "base", place / "a", 0.5)
        weights = load_file(place / "a" / "adapter_model.safetensors")
        stem = "model.layers.0.self_attn.q_proj"
        a, b = (weights[f"base_model.model.{stem}.lora_{x}.weight"].double() for x in "AB")
        torch.testing.assert_close(
            direction.tensors[f"{stem}.weight"].double(), 2 * (8 / 4) * b @ a, rtol=1e-3, atol=1e-6
        )
        policy, batch = Policy.from_pretrained(place / "base", device="cpu"), random_batch()
        at_once = measure(policy, batch, direction, eta=0.5).logp
        adapted = measure(Policy.from_pretrained(place / "a", device="cpu"), batch).logp
        assert abs(at_once - adapted).max() <= 1e-4 * abs(adapted).max()
        in_memory = Direction.between(policy.model, place / "a", 0.5)
        assert all(torch.equal(v, in_memory.tensors[name]) for name, v in direction.tensors.items())
        assert not any("lora" in name for name, _ in policy.model.named_parameters())

    def test_what_has_no_difference_is_refused_by_name(self, place):
        state = load_checkpoint(place / "base", "before", torch.float32).state_dict()
        for before, after, named in (
            (place / "a", place / "wide", "its adapter has r 8, expected that of before, 4"),
            (place / "a", place / "base", "after: has no adapter, and the other side has one"),
            (state, place / "a", "before: has no adapter"),
            (random_model("gpt2"), place / "a", "after: .*an adapter"),
        ):
            with pytest.raises(ValueError, match=named):
                Direction.between(before, after, 1.0)

    def test_an_idle_adapters_direction_says_that_it_does_nothing(self):
        model = with_lora(random_model("llama"), "first")
        model = with_lora(model, "second", seed=6)
        idle = random_direction(model, names=lambda name: ".first." in name)
        with pytest.warns(UserWarning, match="adapters that are not active.*they change nothing"):
            idle.on(model)
