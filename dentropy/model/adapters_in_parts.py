"""Adapters on a base model that FSDP2 spreads over ranks: in parts as it is, and as an update of its weights."""

from __future__ import annotations

from torch import Tensor, nn

from dentropy.model.adapter_layers import train_adapters
from dentropy.model.names import is_adapters, some
from dentropy.model.shards import is_shard, laid_out_as, whole

# Of an adapter's configuration: entries with which making it reads the base weights, unless they are one of these.
UNREAD = {"modules_to_save": ([],), "use_dora": (False,), "init_lora_weights": (True, False, "gaussian")}


def check_for_parts(config, where: str) -> None:
    """ValueError, by an adapter's configuration, where making its tensors takes the base model's whole ones: copies of
    layers, which FSDP2 refuses to make, and what is found from weights."""
    for name, known in UNREAD.items():
        value = config.get(name) if isinstance(config, dict) else None
        if value is not None and value not in known:
            raise ValueError(
                f"{where}: its adapter has {name} {value!r:.100}, which needs whole base weights, expected none, "
                "or no --shard (merge_and_unload() makes a model of it that can be sharded)"
            )


def shard_adapters(model: nn.Module, where: str) -> None:
    """FSDP2 around the modules of adapters, which transformers puts whole into a sharded model. While a pass runs they
    stay gathered: they are small. ValueError for adapters whose tensors are read in the forward of another module,
    where nothing gathers them."""
    from torch.distributed.fsdp import fully_shard

    train_adapters(model)
    mesh = next(p.device_mesh for p in model.parameters() if is_shard(p))
    for name, module in list(model.named_modules()):
        if all(is_shard(p) for p in module.parameters(recurse=False)):
            continue
        if isinstance(module, (nn.ParameterDict, nn.ParameterList)):
            raise ValueError(
                f"{where}: the adapter's {name} is read in another module's forward (as of embeddings, or IA³), which "
                "cannot be sharded, expected LoRA of linear layers, or no --shard (merge_and_unload() makes a model of "
                "it that can be sharded)"
            )
        fully_shard(module, mesh=mesh, reshard_after_forward=False)


def merged_in_parts(adapted: nn.Module, before: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """`before`, a sharded base model's parameters by name, with the active adapters of `adapted`, the model with its
    adapters whole, merged into them: layer by layer, of which one is whole at a time. ValueError for adapters of which
    some tensors are in no layer that can merge them."""
    merged = {id(p): p for p in before.values()}
    left = {id(p): name for name, p in adapted.named_parameters() if is_adapters(name)}
    for module in adapted.modules():
        if getattr(module, "adapter_layer_names", ()) and hasattr(module, "merge"):
            base = module.get_base_layer()._parameters
            found = {name: p for name, p in base.items() if p is not None}
            base |= {name: nn.Parameter(whole(merged[id(p)]), requires_grad=False) for name, p in found.items()}
            module.merge()
            merged |= {id(p): laid_out_as(base[name].detach(), p) for name, p in found.items()}
            base |= found
            for p in module.parameters():
                left.pop(id(p), None)
    if left:
        raise ValueError(f"{where}: {some(left.values())} cannot be merged in parts, expected LoRA, or no --shard")
    return {name: merged[id(p)] for name, p in before.items()}
