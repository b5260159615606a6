"""Sums and products of a dual tensor and a plain one, with the tangent's rule written out.

PyTorch makes a zero tensor for the tangent that is missing and finds the shape of its products in Python: about a
millisecond for each product with a number, a mask or the cosines of a rotary embedding, whatever its size (2.13, CPU;
a product of two duals takes some microseconds). A decoder layer has eight of them. Values and tangents are the same
bits.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

NUMBERS = (int, float)


class OneSidedTangents(TorchFunctionMode):
    """Inside it, +, −, × and ÷ of a dual tensor by a plain tensor or a number, and `linear` with a plain bias, take the
    short way; everything else, `out=`, `alpha=` and in-place forms among it, is PyTorch's own.

    Example:
        >>> from torch.autograd import forward_ad
        >>> with forward_ad.dual_level(), OneSidedTangents():
        ...     x = forward_ad.make_dual(torch.ones(2), torch.tensor([1.0, 2.0]))
        ...     forward_ad.unpack_dual(3 * x + torch.ones(2)).tangent
        tensor([3., 6.])
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rule = _RULES.get(func)
        found = None if rule is None or kwargs else rule(func, *args)
        return func(*args, **(kwargs or {})) if found is None else found


def _split(x) -> tuple[Tensor | float, Tensor | None] | None:
    """Primal and tangent; None of what is neither a tensor nor a number."""
    if isinstance(x, Tensor):
        return forward_ad.unpack_dual(x)
    return (x, None) if isinstance(x, NUMBERS) else None


def _one_side(a, b):
    """(primal, primal, tangent of a, tangent of b), one of them None; None where both or neither has one."""
    left, right = _split(a), _split(b)
    if left is None or right is None or (left[1] is None) == (right[1] is None):
        return None
    return left[0], right[0], left[1], right[1]


def _sum(func, a, b):
    sides = _one_side(a, b)
    if sides is None:
        return None
    x, y, dx, dy = sides
    out = func(x, y)
    tangent = dx if dy is None else -dy if func in _MINUS else dy
    # A copy: what is done to the sum in place must not reach the summand.
    return forward_ad.make_dual(out, tangent.to(out.dtype).expand(out.shape).clone())


def _product(func, a, b):
    sides = _one_side(a, b)
    if sides is None:
        return None
    x, y, dx, dy = sides
    return forward_ad.make_dual(func(x, y), func(x, dy) if dx is None else func(dx, y))


def _quotient(func, a, b):
    sides = _one_side(a, b)
    if sides is None or sides[2] is None:  # by a dual tensor it is no multiple of the tangent
        return None
    x, y, dx, _ = sides
    return forward_ad.make_dual(func(x, y), func(dx, y))


def _linear(func, x, weight, bias=None):
    """PyTorch's own is short where there is no bias, or one that moves."""
    if bias is None or forward_ad.unpack_dual(bias).tangent is not None:
        return None
    (x, dx), (weight, dweight) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(weight)
    terms = [func(*pair) for pair in ((dx, weight), (x, dweight)) if pair[0] is not None and pair[1] is not None]
    return forward_ad.make_dual(func(x, weight, bias), sum(terms)) if terms else None


_MINUS = {torch.sub, Tensor.sub, Tensor.__sub__}
_RULES = dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, *_MINUS), _sum)
_RULES |= dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _product)
_RULES |= dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _quotient)
_RULES[functional.linear] = _linear
