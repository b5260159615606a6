"""Adapter folders of PEFT: the tensors as their file has them, and what they make of a base model."""

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dentropy.doors import json_value, third_party
from dentropy.model.adapters_in_parts import check_for_parts, merged_in_parts
from dentropy.model.checkpoint import ADAPTER_CONFIG, load_checkpoint
from dentropy.model.names import canonical, is_adapters, some

WEIGHTS = "adapter_model.safetensors"
NO_EFFECT_AT_FIRST = (True, "gaussian")  # of PEFT's ways to start LoRA; others change the base model too
# Entries of an adapter's configuration that say nothing of what its tensors do.
BESIDE_THE_POINT = {"auto_mapping", "inference_mode", "lora_dropout", "peft_version", "revision", "task_type"}


def is_adapter_folder(side) -> bool:
    return isinstance(side, (str, os.PathLike)) and (Path(side) / ADAPTER_CONFIG).is_file()


def adapter_tensors(folder, argument: str) -> dict[str, Tensor]:
    """Name -> tensor of an adapter folder, each in the dtype it was saved in, whatever the base model's is."""
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{argument}: {folder}: an adapter folder without {WEIGHTS}, expected one in safetensors")
    with third_party(f"{argument}: {path}: not a safetensors file", "the adapter's tensors"):
        return load_file(path)


def check_same_adapter(before, after) -> None:
    """ValueError where two adapter folders differ in more than their tensors: in rank or scale, say, or in the base."""
    configs = [_config(before, "before"), _config(after, "after")]
    for name in sorted((set(configs[0]) | set(configs[1])) - BESIDE_THE_POINT):
        a, b = (config.get(name) for config in configs)
        if _form(name, a) != _form(name, b):
            raise ValueError(
                f"after: {after}: its adapter has {name} {b!r}, expected that of before, {a!r}: tensors of different "
                "adapters have no difference"
            )


def adapter_as_update(
    base, folder, trust_remote_code: bool = False, shard: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of `base`, a model or checkpoint folder, and the same with the adapter of `folder` merged into them,
    in float32 or better: the adapter as an update of the base weights. With `shard` in parts, of a folder alone."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"after: {folder}: an adapter folder, expected peft to be installed ({error})") from error

    if shard:
        check_for_parts(_config(folder, "after"), f"after: {folder}")
    if isinstance(base, nn.Module):
        if shard:
            raise ValueError("before: a model, expected the folder of it where ranks hold it in parts")  # no copy of it
        model = copy.deepcopy(base)
    else:
        how = {"trust_remote_code": trust_remote_code, "shard": shard}
        model = load_checkpoint(base, "before", torch.float32, **how)
    if not shard:
        model = model if next(model.parameters()).dtype == torch.float64 else model.float()
    of_base = dict(model.named_parameters(remove_duplicate=False))
    before = {name: p.detach() if shard else p.detach().clone() for name, p in of_base.items()}
    saved = {canonical(name) for name in adapter_tensors(folder, "after")}
    with third_party(f"after: {folder}: an adapter that before cannot take", "one of its own"):
        adapted = PeftModel.from_pretrained(model, str(folder))
    names = {canonical(name): name for name, _ in adapted.named_parameters(remove_duplicate=False)}
    strange = sorted((saved - set(names)) | {name for name in names if is_adapters(names[name])} - saved)
    if strange:
        raise ValueError(
            f"after: {folder}: {len(strange)} tensors of the adapter are missing there or unknown to before "
            f"({some(strange)}), expected an adapter of this base model"
        )
    if not hasattr(adapted, "merge_and_unload"):
        raise ValueError(f"after: {folder}: an adapter that cannot be merged into weights, expected one like LoRA")
    if shard:
        return before, merged_in_parts(adapted, of_base, f"after: {folder}")
    merged = adapted.merge_and_unload()
    return before, {name: p.detach() for name, p in merged.named_parameters(remove_duplicate=False)}


def base_it_began_at(folder, argument: str) -> str | None:
    """The base model of an adapter that had no effect when its training began; None for what is no such adapter."""
    if not is_adapter_folder(folder):
        return None
    config = _config(folder, argument)
    base = config.get("base_model_name_or_path")
    began = config.get("peft_type") == "LORA" and config.get("init_lora_weights", True) in NO_EFFECT_AT_FIRST
    return base if began and isinstance(base, str) else None


def _config(folder, argument: str) -> dict:
    path = Path(folder) / ADAPTER_CONFIG
    config = json_value(path.read_bytes(), f"{argument}: {path}")
    if not isinstance(config, dict):
        raise ValueError(f"{argument}: {path}: a JSON {type(config).__name__}, expected an object")
    return config


def _form(name: str, value):
    """A value to compare: lists that are sets sorted, one folder under one name, empty things as one."""
    if name == "base_model_name_or_path" and isinstance(value, str) and Path(value).is_dir():
        return str(Path(value).resolve())
    if name == "init_lora_weights" and isinstance(value, bool):
        return None
    if isinstance(value, list):
        return sorted(map(str, value))
    return value or None
