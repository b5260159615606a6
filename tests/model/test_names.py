import pytest

from dentropy.model.names import canonical, resolve, unwrapped


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
