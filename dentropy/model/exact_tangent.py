"""The other half of the self-check: a tangent of the weights arrives at what is reported.

A module that reads its weights around autograd (`.data`, `detach`, a copy put in their place), or has a derivative of
its own that is wrong, gives right values and a wrong slope. So one parameter of every kind moves a little, and the
derivatives of log-probability and entropy are held against central differences.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dentropy.model.adapter_layers import has_adapters, unusual_adapters
from dentropy.model.packed_row import PackedRow

# Steps relative to the weights. In float32 the rounding of the difference and its curvature are both below a hundredth
# of the derivative at the first; the second tells a wrong derivative from a function that jumps (a router's choice).
STEPS = (1e-3, 2e-4)
# A difference from the derivatives, relative to them, that rounding does not explain: of many kinds at once, of one.
TOLERANCE, OF_ONE = 2e-2, 0.2
# Elements that move at once: tangents and moved weights of these are all the memory that the check takes.
AT_ONCE = 2**27


@torch.no_grad()
def check_tangents(policy, row: PackedRow) -> None:
    """ValueError, naming the parameters, where their tangents do not arrive as a central difference says they should,
    and where no parameter has any effect.

    Not in half precision: a step that its weights resolve is too large for a derivative.
    """
    if torch.finfo(policy.dtype).bits < 32:
        return
    moved = False
    with policy.ready():
        for group in _groups(policy.model):
            derivative, difference = _derivatives(policy, row, group)
            moved |= bool(difference(STEPS[0]).any())
            if _is_wrong(derivative, difference, TOLERANCE):
                lost = [n for n in group if _is_wrong(*_derivatives(policy, row, {n: group[n]}), OF_ONE)]
                raise ValueError(_said(policy.model, lost or list(group)))
    if not moved and not has_adapters(policy.model):  # those may be merged, or wait for something
        raise ValueError(
            f"policy: no parameter of {type(policy.model).__name__} has an effect on its logits, expected a model that "
            "computes from its parameters: unwrap it from what keeps copies of them"
        )


def _groups(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """One parameter of each kind: the vectors, which weigh little, together; the others as many as may move at once.

    Of those that ask for gradients, where some do: no update moves the others, and what PEFT wraps may refuse to.
    """
    of_kind: dict[tuple, tuple[str, nn.Parameter]] = {}
    named = list(model.named_parameters())
    for name, p in [(name, p) for name, p in named if p.requires_grad] or named:
        of_kind.setdefault(_kind(model, name, p), (name, p))
    vectors = {name: p for name, p in of_kind.values() if p.ndim < 2}
    group: dict[str, nn.Parameter] = {}
    for name, p in of_kind.values():
        if p.ndim >= 2:
            if group and sum(q.numel() for q in group.values()) + p.numel() > AT_ONCE:
                yield group
                group = {}
            group[name] = p
    yield from (found for found in (group, vectors) if found)


def _kind(model: nn.Module, name: str, p: nn.Parameter) -> tuple:
    """Equal for parameters that only differ in their layer: what the modules around them are, and do of their own."""
    around, module = [], model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        around.append((type(module), "forward" in vars(module), hooks))
    return re.sub(r"\d+", "*", name), p.shape, tuple(around)


def _derivatives(policy, row: PackedRow, group: dict[str, nn.Parameter]) -> tuple[Tensor, Callable]:
    """Derivatives along a direction of `group`, and what gives their central difference at a step."""

    def score(eta: float, tangent: bool = False):
        def make(p: Tensor) -> Tensor:
            v = _direction(p)
            return forward_ad.make_dual(p, v) if tangent else torch.add(p, v, alpha=eta)

        with policy.in_place({id(p): make for p in group.values()}):
            return policy.score(row, tangent=tangent)

    with forward_ad.dual_level():
        found = score(0.0, tangent=True)
    derivative = _joined(found.dlogp, found.dentropy)

    @cache
    def difference(step: float) -> Tensor:
        plus, minus = (score(eta) for eta in (step, -step))
        return (_joined(plus.logp, plus.entropy) - _joined(minus.logp, minus.entropy)) / (2 * step)

    return derivative, difference


def _is_wrong(derivative: Tensor, difference: Callable[[float], Tensor], tolerance: float) -> bool:
    """Whether a derivative differs from both central differences, and those much less from each other."""
    off = []
    for step in STEPS:
        off.append((difference(step) - derivative).norm())
        if off[-1] <= tolerance * difference(step).norm():
            return False
    return bool(min(off) > 4 * (difference(STEPS[0]) - difference(STEPS[1])).norm())


def _direction(p: Tensor) -> Tensor:
    """Noise that is a product over dimensions, times the weights, so that nothing moves by more than its own size
    (zeros of padding stay); where all of them are zero (fresh biases and adapters) noise of size 1."""
    generator = torch.Generator(p.device).manual_seed(0)
    v = p.clone() if p.any() else torch.ones_like(p)
    for i, n in enumerate(p.shape):
        noise = torch.randn(n, generator=generator, device=p.device, dtype=p.dtype)
        v *= noise.reshape(-1, *[1] * (p.ndim - 1 - i))
    return v


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts).double()


def _said(model: nn.Module, names: list[str]) -> str:
    names = names[::-1]  # what is wrong in a module is so for all that feeds it: the last is the nearest
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names[:3])
    kinds = ", ".join(dict.fromkeys(type(model.get_submodule(name)).__name__ for name in modules))
    adapters = unusual_adapters(model)
    return (
        f"policy: {adapters + ': ' if adapters else ''}derivatives along {', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''} are not those of its values: {kinds}, or what it feeds, reads weights "
        "around autograd (.data, detach, a copy of its own) or has a wrong jvp, expected modules that compute from "
        "their parameters, as those of transformers and PEFT's LoRA do"
    )
