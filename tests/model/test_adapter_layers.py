import copy

import torch
from models import random_model, with_lora

from dentropy.model.adapter_layers import adapter_parameters
from dentropy.model.names import is_adapters


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
