"""Models that a pass cannot go through, told by what they are made of, each with what to do instead."""

from torch import Tensor, nn

from dentropy.model.shards import is_shard

# Where accelerate keeps the forward that its mixed precision stands before.
ORIGINAL_FORWARD = "_original_forward"


def check_usable(model: nn.Module) -> None:
    """ValueError for wrapped, compiled, merged, absent or quantized weights, and for soft prompts. Of shards see
    `spread`."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {kind}, expected a causal language model of transformers (AutoModelForCausalLM)")
    _check_not_autocast(model)
    _check_own_forward(model)
    for wrapper in ("module", "_orig_mod"):
        # FSDP answers for the model inside it, PEFT too, but PEFT's type knows how to give it out.
        own = hasattr(type(model), "get_input_embeddings") or hasattr(type(model), "get_base_model")
        if isinstance(getattr(model, wrapper, None), nn.Module) and not own:
            raise ValueError(f"model: wrapped in {kind}, expected the model itself: pass model.{wrapper}")
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "config")):
        raise ValueError(f"model: {kind}, expected a causal language model of transformers (AutoModelForCausalLM)")
    if getattr(model, "is_quantized", False) or any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError("model: quantized weights, expected floating ones: load it without quantization_config")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"model: soft prompts ({model.active_peft_config.peft_type.value}), which are no weights of the model that "
            "reads them, expected adapters in its layers (LoRA) or none"
        )


def _check_not_autocast(model: nn.Module) -> None:
    own = vars(model)
    if ORIGINAL_FORWARD in own and own.get("forward", own[ORIGINAL_FORWARD]) is not own[ORIGINAL_FORWARD]:
        raise ValueError(
            "model: its forward runs in accelerate's mixed precision, in which small changes of the weights are lost, "
            "expected the model's own: accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )


def _check_own_forward(model: nn.Module) -> None:
    """ValueError where modules do not compute, from parameters of their own, what tangents can follow."""
    for name, p in model.named_parameters():
        _check_parameter(name, p)
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or isinstance(
            getattr(module, "_orig_mod", None), nn.Module
        ):
            raise ValueError(
                f"model: {name or type(model).__name__} is compiled, and compiled code drops tangents, expected the "
                "model as it was before torch.compile (model._orig_mod) or model.compile"
            )
        _check_matrix(name, module)
    _check_not_merged(model)


def _check_parameter(name: str, p: nn.Parameter) -> None:
    if p.is_meta:
        raise ValueError(
            f"model: weights that are not there ({name} is on the meta device), expected loaded ones: load it without "
            "init_empty_weights and without offloading (device_map)"
        )
    if p.numel() == 0 or hasattr(p, "ds_tensor"):
        raise ValueError(
            f"model: weights that are not there ({name} has shape {tuple(p.shape)}, as ZeRO-3 leaves its partitions), "
            "expected whole ones: load a checkpoint gathered by deepspeed's zero_to_fp32, or save_16bit_model"
        )
    if p.is_inference():
        raise ValueError("model: weights made under torch.inference_mode, expected ones that keep tangents")
    if type(p.data) is not Tensor and not is_shard(p):
        raise ValueError(f"model: {name} is a {type(p.data).__name__}, expected plain tensors")


def _check_matrix(name: str, module: nn.Module) -> None:
    """A matrix product or a look-up needs a matrix; where there is none, a wrapper brings it for its own forward."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, (nn.Linear, nn.Embedding)) or not isinstance(weight, Tensor) or is_shard(weight):
        return
    if weight.ndim != 2 or weight.untyped_storage().nbytes() == 0:
        raise ValueError(
            f"model: weights that are not there ({name}.weight has shape {tuple(weight.shape)} and "
            f"{weight.untyped_storage().nbytes()} bytes, as FSDP leaves it between forwards), expected whole ones: "
            "gather them into a plain model first"
        )


def _check_not_merged(model: nn.Module) -> None:
    """FSDP's flat parameters: modules hold views of one long parameter, put there anew by its own forward, so that
    what is put in the parameter's place is never read."""
    plain = {name: p for name, p in model.named_parameters() if not is_shard(p)}
    merged = {p.untyped_storage().data_ptr(): (name, p) for name, p in plain.items() if p.ndim == 1}
    for place, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or not value.is_floating_point():
                continue
            name, p = merged.get(value.untyped_storage().data_ptr(), ("", None))
            if p is not None and value.numel() < p.numel():
                raise ValueError(
                    f"model: merged weights ({place}.{attribute} is a view of {name}, as FSDP makes them), expected a "
                    "parameter for each: gather them into a plain model "
                    "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
                )
