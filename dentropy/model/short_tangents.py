"""Sums and products with the tangent's rule written out, where PyTorch's own is longer.

Of a dual tensor and a plain one: PyTorch makes a zero tensor for the tangent that is missing and finds the shape of its
products in Python: about a millisecond for each product with a number, a mask or the cosines of a rotary embedding,
whatever its size (2.13, CPU; a product of two duals takes some microseconds). A decoder layer has eight of them. Values
and tangents are the same bits.

Of two dual tensors: PyTorch makes both parts of a product's tangent and then their sum. Here the second is added to the
first where that stands, as matrix products do anyway: what is read and written is what a forward needs three times, and
not four. Values are the same bits, tangents are rounded once less.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

NUMBERS = (int, float)


class ShortTangents(TorchFunctionMode):
    """Inside it, +, −, × and ÷ of a dual tensor by a plain tensor or a number, × of two dual tensors, squares and
    `linear` take the short way; everything else, `out=`, `alpha=` and in-place forms among it, is PyTorch's own.

    Example:
        >>> from torch.autograd import forward_ad
        >>> with forward_ad.dual_level(), ShortTangents():
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
        return _product_of_duals(func, a, b)
    x, y, dx, dy = sides
    return forward_ad.make_dual(func(x, y), func(x, dy) if dx is None else func(dx, y))


def _product_of_duals(func, a, b):
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    (x, dx), (y, dy) = forward_ad.unpack_dual(a), forward_ad.unpack_dual(b)
    if dx is None or dy is None or x.dtype != y.dtype:
        return None
    return forward_ad.make_dual(func(x, y), func(dx, y).addcmul_(x, dy))


def _quotient(func, a, b):
    sides = _one_side(a, b)
    if sides is None or sides[2] is None:  # by a dual tensor it is no multiple of the tangent
        return None
    x, y, dx, _ = sides
    return forward_ad.make_dual(func(x, y), func(dx, y))


def _square(func, a, exponent):
    if not isinstance(a, Tensor) or not isinstance(exponent, NUMBERS) or exponent != 2:
        return None
    x, dx = forward_ad.unpack_dual(a)
    return None if dx is None else forward_ad.make_dual(func(x, exponent), (x * dx).mul_(2))


def _linear(func, x, weight, bias=None):
    (x, dx), (weight, dweight) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(weight)
    bias, dbias = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    if (dx is None and dweight is None) or weight.ndim != 2:
        return None
    out = func(x, weight, bias)
    factors = [(dx, weight), (x, dweight)]
    first, *more = [(a.reshape(-1, a.shape[-1]), b) for a, b in factors if a is not None and b is not None]
    tangent = func(*first, dbias)
    for a, b in more:
        tangent.addmm_(a, b.T)
    return forward_ad.make_dual(out, tangent.view(out.shape))


_MINUS = {torch.sub, Tensor.sub, Tensor.__sub__}
_RULES = dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, *_MINUS), _sum)
_RULES |= dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _product)
_RULES |= dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _quotient)
_RULES |= dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _square)
_RULES[functional.linear] = _linear
