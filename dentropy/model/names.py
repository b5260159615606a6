"""One parameter under several names: what wrappers and adapters put into a name, and which is meant.

DDP, FSDP, torch.compile and PEFT put a prefix before every name. PEFT also names the adapter behind its tensors
(`q_proj.lora_A.default.weight`), which its files leave out, as does no base checkpoint its `base_layer`.
"""

import re
from collections.abc import Callable, Iterable

_WRAPPERS = re.compile(
    r"^(?:(?:module|base_model\.model)\.)+|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# "layer.lora_A.default.weight"; modules_to_save are whole copies of a layer.
_ADAPTER = re.compile(
    r"\.(?P<kind>(?:lora|hada|lokr|vera|ia3|oft|boft|trainable_tokens)_\w+|modules_to_save)"
    r"\.(?!(?:weight|bias)$)(?P<adapter>[^.]+)"
)
_OF_ADAPTER_FILES = re.compile(r"\.(?:lora|hada|lokr|vera|ia3|oft|boft|trainable_tokens)_\w+(?:\.|$)")


def unwrapped(name: str) -> str:
    """The name inside DDP, FSDP, torch.compile and PEFT: "base_model.model.lm_head.weight" -> "lm_head.weight"."""
    while (inner := _WRAPPERS.sub("", name)) != name:
        name = inner
    return name


def canonical(name: str) -> str:
    """The name without wrappers and without the adapter's name, as adapter files have it; base weights without PEFT's
    `base_layer`, copies in modules_to_save as the layer they stand for."""
    name = _ADAPTER.sub(lambda at: "" if at["kind"] == "modules_to_save" else f".{at['kind']}", unwrapped(name))
    name = re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)
    return re.sub(r"\.base_layer(\.\w+)$", r"\1", name)


def resolve(argument: str, names: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """Name -> which of the model's `own` names it means; those that mean none are left out.

    The very name counts first, then the name without wrappers, then without the adapter's name.

    Raises:
        ValueError: beginning with `argument`, where a name could mean several.

    Example:
        >>> resolve("direction", ["base_model.model.q.lora_A.weight"], ["q.lora_A.default.weight", "q.weight"])
        {'base_model.model.q.lora_A.weight': 'q.lora_A.default.weight'}
    """
    own = list(own)
    found, left = {}, list(names)
    for form in (str, unwrapped, canonical):
        if not left:
            break
        meant = _by_form(own, form)
        for name in left:
            several = meant.get(form(name), [])
            if len(several) > 1:
                raise ValueError(
                    f"{argument}: {name} could be {' or '.join(several[:3])} of the policy, expected its own name"
                )
            found |= {name: several[0]} if several else {}
        left = [name for name in left if name not in found]
    return found


def _by_form(own: list[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    meant: dict[str, list[str]] = {}
    for name in own:
        meant.setdefault(form(name), []).append(name)
    return meant


def is_adapters(name: str) -> bool:
    """Whether a tensor of this name is an adapter's, in a model or in an adapter file."""
    return bool(_ADAPTER.search(name) or _OF_ADAPTER_FILES.search(name))


def some(names: Iterable[str]) -> str:
    """The first three, for messages."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
