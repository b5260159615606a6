import copy

import pytest
import torch
from models import random_model, with_lora

from dentropy.model.names import adapter_parameters, canonical, is_adapters, resolve, unwrapped


@pytest.mark.parametrize(
    "name, inside, short",
    [
        ("lm_head.weight", "lm_head.weight", "lm_head.weight"),
        ("module.base_model.model.a.q.lora_A.my_task.weight", "a.q.lora_A.my_task.weight", "a.q.lora_A.weight"),
        ("a.embed.lora_embedding_B.default", "a.embed.lora_embedding_B.default", "a.embed.lora_embedding_B"),
        ("a.q.lora_magnitude_vector.x.weight", "a.q.lora_magnitude_vector.x.weight", "a.q.lora_magnitude_vector"),
        ("_orig_mod.h.modules_to_save.x.weight", "h.modules_to_save.x.weight", "h.weight"),
        ("a.q.base_layer.weight", "a.q.base_layer.weight", "a.q.weight"),
        ("h.original_module.weight", "h.original_module.weight", "h.original_module.weight"),
        ("a._fsdp_wrapped_module.q._orig_mod.bias", "a.q.bias", "a.q.bias"),
    ],
)
def test_what_wrappers_put_into_a_name_is_taken_out(name, inside, short):
    assert (unwrapped(name), canonical(name)) == (inside, short)
    assert canonical(short) == short


def test_the_nearest_form_of_a_name_counts_and_several_are_refused():
    own = ["q.lora_A.default.weight", "q.lora_A.other.weight", "q.weight"]
    assert resolve("v", ["base_model.model.q.lora_A.other.weight", "q.weight", "r.weight"], own) == {
        "base_model.model.q.lora_A.other.weight": "q.lora_A.other.weight",
        "q.weight": "q.weight",
    }
    with pytest.raises(
        ValueError, match="^v: q.lora_A.weight could be q.lora_A.default.weight or q.lora_A.other.weight"
    ):
        resolve("v", ["q.lora_A.weight"], own)


def test_which_adapter_parameters_have_an_effect():
    model = with_lora(random_model("llama"), "first", modules_to_save=["lm_head"])
    model = with_lora(model, "second", seed=6, target_modules=["q_proj"])
    effect = adapter_parameters(model)
    assert all(map(is_adapters, effect)) and any("modules_to_save" in name for name in effect)
    assert {name for name, active in effect.items() if active} == {name for name in effect if ".second." in name}
    with model.disable_adapter():
        assert not any(adapter_parameters(model).values())
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    assert not any(on for name, on in adapter_parameters(merged).items() if "lora_" in name)
    assert adapter_parameters(torch.nn.Linear(2, 2)) == {}
