"""Sums and products of a dual tensor and a plain one: the bits of PyTorch's own way, by a way that it does not take."""

import operator

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dentropy.model import attention
from dentropy.model.one_sided import OneSidedTangents

GENERATOR = torch.Generator().manual_seed(0)
X, DX, C = torch.randn(3, 4, 8, generator=GENERATOR).unbind()
HALF, ROW, MASK, B = C.half(), C[:1], C > 0, C[:, 0]
TAKEN = {
    f"{op.__name__} of {name}": (op, other)
    for op in (operator.add, operator.sub, operator.mul, operator.truediv)
    for name, other in {"plain": C, "half": HALF, "row": ROW, "number": 2.5}.items()
} | {
    "mask": (operator.mul, MASK),
    "broadcast sum": (lambda x, c: x[:1] + c, C),
    "reflected sum": (lambda x, c: c + x, C),
    "reflected number": (lambda x, c: c + x, 2),
    "reflected difference": (lambda x, c: c - x, C),
    "reflected product": (lambda x, c: c * x, C),
    "method": (lambda x, c: x.mul(c).add(c).sub(c).div(c), C),
    "function": (lambda x, c: torch.div(torch.sub(torch.add(torch.mul(x, c), c), c), c), C),
    "linear, bias stays": (lambda x, c: functional.linear(x, c, B[:4]), C),
    "linear, weight moves": (lambda x, c: functional.linear(c, x, B[:4]), C),
}
LEFT = {
    "both": (lambda x, c: x * x + x, C),
    "by a dual tensor": (lambda x, c: c / x, C),
    "alpha": (lambda x, c: torch.add(x, c, alpha=3), C),
    "no bias": (functional.linear, C),
}


@pytest.mark.parametrize("name", TAKEN | LEFT)
def test_bits_of_pytorch(name):
    function, other = (TAKEN | LEFT)[name]
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone(), DX.clone())
        want = forward_ad.unpack_dual(function(x, other))
        with OneSidedTangents():
            got = forward_ad.unpack_dual(function(x, other))
        for one, two in zip(got, want, strict=True):
            assert one.dtype == two.dtype and one.shape == two.shape
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", TAKEN)
def test_no_zero_tensor_is_made(name, monkeypatch):
    """Shapes of what holds a zero tensor are found by PyTorch's references in Python: none of them is asked."""
    function, other = TAKEN[name]
    asked = _asked_for_shapes(monkeypatch)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone(), DX.clone())
        with OneSidedTangents():
            function(x, other)
        assert not asked
        if "reflected" not in name:  # some of those PyTorch takes a short way itself
            function(x, other)
            assert asked


def _asked_for_shapes(monkeypatch) -> list[str]:
    asked, elementwise = [], torch._prims_common.elementwise_dtypes

    def noted(*args, **kwargs):
        asked.append("shape")
        return elementwise(*args, **kwargs)

    monkeypatch.setattr(torch._prims_common, "elementwise_dtypes", noted)
    return asked


def test_a_sum_changed_in_place_leaves_the_summand():
    with forward_ad.dual_level(), OneSidedTangents():
        x = forward_ad.make_dual(X.clone(), DX.clone())
        (x + 1.0).mul_(3.0)
        (x - C).mul_(3.0)
        assert torch.equal(forward_ad.unpack_dual(x).tangent, DX)


def test_attention_is_outside_of_modes():
    """It makes many small calls, none of them a product with a dual tensor."""
    inside = []

    class Noted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            inside.append(func)
            return func(*args, **(kwargs or {}))

    query = X.expand(1, 2, 4, 8)
    plain = attention.attention_forward(None, query, query, query)[0]
    with Noted():
        noted = attention.attention_forward(None, query, query, query)[0]
    assert inside == [attention.attention_forward] and torch.equal(plain, noted)
