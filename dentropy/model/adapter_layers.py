"""What PEFT's layers say of their adapters: which take part in the forward, and of which kind they are.

Read off the layers themselves, so that adapters count alike in a PeftModel and in a model that transformers loaded from
an adapter folder.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter

from torch import Tensor, nn


def has_adapters(model: nn.Module) -> bool:
    return any(True for _ in _layers(model))


def is_dora(model: nn.Module) -> bool:
    return any(len(getattr(module, "lora_magnitude_vector", ())) for module in model.modules())


def adapter_parameters(model: nn.Module) -> dict[str, bool]:
    """Name of each adapter parameter of the model -> whether it has an effect: its adapter is active in its layer, not
    disabled, and not merged into the weights."""
    effect: dict[int, bool] = {}
    for layer in _layers(model):
        for why, _, parameter in _parameters(layer):
            effect[id(parameter)] = effect.get(id(parameter), False) or why is None
    return {name: effect[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in effect}


def train_adapters(model: nn.Module) -> None:
    """Lets the active adapters ask for gradients, as they did in training: adapter folders load frozen."""
    for layer in _layers(model):
        for _, adapter, parameter in _parameters(layer):
            if adapter in layer.active_adapters:
                parameter.requires_grad_(True)


def check_not_idle(model: nn.Module, moving: Sequence[Tensor]) -> None:
    """ValueError where all parameters that move belong to adapters that have no part in the forward."""
    idle: dict[int, str] = {}
    active: set[int] = set()
    for layer in _layers(model):
        for why, adapter, parameter in _parameters(layer):
            if why is None:
                active.add(id(parameter))
            else:
                idle[id(parameter)] = f"adapter {adapter!r} is {why}"
        idle |= {id(p): "an adapter's copy stands in their place" for p in _replaced(layer)}
    said = {None if id(p) in active else idle.get(id(p)) for p in moving}
    if moving and None not in said:
        raise ValueError(
            f"direction: moves only parameters that the policy's forward does not use ({'; '.join(sorted(said))}), "
            "expected the policy with the adapter active, enabled and not merged (model.set_adapter, "
            "model.enable_adapters, model.unmerge_adapter)"
        )


def unusual_adapters(model: nn.Module) -> str:
    """ "adapters of kind X", by PEFT's names, for those that are not LoRA's ("aLoRA" waits for an invocation); else
    ""."""
    configs = getattr(model, "peft_config", None) or {}
    kinds = set()
    for config in configs.values() if isinstance(configs, dict) else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        kinds.add("aLoRA" if getattr(config, "alora_invocation_tokens", None) else kind)
    others = sorted(kinds - {"LORA"})
    return f"adapters of kind {', '.join(others)}" if others else ""


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if getattr(m, "adapter_layer_names", ()) and hasattr(m, "active_adapters"))


def _parameters(layer: nn.Module) -> Iterator[tuple[str | None, str, nn.Parameter]]:
    """(why it is idle, None where it is not; the adapter's name; the parameter) for every adapter's parameter."""
    for place in layer.adapter_layer_names:
        try:
            of_adapters = attrgetter(place)(layer)
        except AttributeError:  # PEFT names what only some of its layers have
            continue
        for adapter, part in of_adapters.items() if hasattr(of_adapters, "items") else ():
            parameters = part.parameters() if isinstance(part, nn.Module) else [part]
            for parameter in parameters:
                if isinstance(parameter, nn.Parameter):
                    yield _idle(layer, adapter), adapter, parameter


def _idle(layer: nn.Module, adapter: str) -> str | None:
    if adapter in getattr(layer, "merged_adapters", ()):
        return "merged into the weights"
    if layer.disable_adapters:
        return "disabled"
    return None if adapter in layer.active_adapters else "not active"


def _replaced(layer: nn.Module) -> list[nn.Parameter]:
    """The weights that a trained copy (modules_to_save) stands in for."""
    copies = getattr(layer, "modules_to_save", None)
    used = copies is not None and not layer.disable_adapters and any(name in copies for name in layer.active_adapters)
    return list(layer.original_module.parameters()) if used else []
