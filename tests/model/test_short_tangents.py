"""Sums and products: of a dual tensor and a plain one the bits of PyTorch's own way, by a way that it does not take; of
two dual tensors the rule."""

import operator

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dentropy.model import attention
from dentropy.model.short_tangents import ShortTangents

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
SHORT = {  # ways that PyTorch's own is no longer than
    "square": (lambda x, c: x.pow(2) + torch.pow(x, 2.0) + x**2, C),
    "linear, no bias": (functional.linear, C),
}
LEFT = {
    "sum of both": (lambda x, c: x + x, C),
    "cube": (lambda x, c: x**3 + 2**x + c.abs() ** x, C),
    "linear, one row of weights": (lambda x, c: functional.linear(x, c[0]), C),
    "by a dual tensor": (lambda x, c: c / x, C),
    "alpha": (lambda x, c: torch.add(x, c, alpha=3), C),
}


@pytest.mark.parametrize("name", TAKEN | SHORT | LEFT)
def test_bits_of_pytorch(name):
    function, other = (TAKEN | SHORT | LEFT)[name]
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone(), DX.clone())
        want = forward_ad.unpack_dual(function(x, other))
        with ShortTangents():
            got = forward_ad.unpack_dual(function(x, other))
        for one, two in zip(got, want, strict=True):
            assert one.dtype == two.dtype and one.shape == two.shape
            assert torch.equal(one, two)


W, DW, V = torch.randn(3, 5, 8, generator=GENERATOR).double().unbind()
OF_DUALS = {  # a function of x [3, 4, 8], w [5, 8] and b [5], and its tangent
    "product": (lambda x, w, b: x * w[:4], lambda x, w, b, dx, dw, db: dx * w[:4] + x * dw[:4]),
    "rows": (lambda x, w, b: torch.mul(w[0], x), lambda x, w, b, dx, dw, db: dx * w[0] + x * dw[0]),
    "linear": (functional.linear, lambda x, w, b, dx, dw, db: dx @ w.T + x @ dw.T + db),
    "linear, transposed input": (
        lambda x, w, b: functional.linear(x.transpose(0, 1), w),
        lambda x, w, b, dx, dw, db: (dx @ w.T + x @ dw.T).transpose(0, 1),
    ),
    "linear, bias stays": (
        lambda x, w, b: functional.linear(x, w, forward_ad.unpack_dual(b).primal),
        lambda x, w, b, dx, dw, db: dx @ w.T + x @ dw.T,
    ),
    "linear, weight and bias move": (
        lambda x, w, b: functional.linear(forward_ad.unpack_dual(x).primal, w, b),
        lambda x, w, b, dx, dw, db: x @ dw.T + db,
    ),
    "square": (lambda x, w, b: x.pow(2), lambda x, w, b, dx, dw, db: 2 * x * dx),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_DUALS)
def test_product_of_dual_tensors(name, dtype):
    """Held to the rule in float64, and nothing of the factors is written to."""
    function, rule = OF_DUALS[name]
    x, dx = torch.randn(2, 3, 4, 8, generator=GENERATOR).double()
    primals, tangents = ([t.to(dtype) for t in given] for given in ((x, W, V[:, 0].clone()), (dx, DW, V[:, 1].clone())))
    before = [t.clone() for t in (*primals, *tangents)]
    with forward_ad.dual_level(), ShortTangents():
        duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
        out, dout = forward_ad.unpack_dual(function(*duals))
        for now, then in zip((*primals, *tangents), before, strict=True):
            assert torch.equal(now, then)
    exact = [t.double() for t in before]
    with forward_ad.dual_level():
        assert torch.equal(out, function(*before[:3]))
    want = rule(*exact[:3], *exact[3:])
    eps = torch.finfo(dtype).eps
    assert dout.dtype == dtype and dout.shape == want.shape
    assert (dout.double() - want).abs().max() <= 2 * eps * want.abs().max()


@pytest.mark.parametrize("name", TAKEN)
def test_no_zero_tensor_is_made(name, monkeypatch):
    """Shapes of what holds a zero tensor are found by PyTorch's references in Python: none of them is asked."""
    function, other = TAKEN[name]
    asked = _asked_for_shapes(monkeypatch)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone(), DX.clone())
        with ShortTangents():
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
    with forward_ad.dual_level(), ShortTangents():
        x = forward_ad.make_dual(X.clone(), DX.clone())
        (x + 1.0).mul_(3.0)
        (x - C).mul_(3.0)
        assert torch.equal(forward_ad.unpack_dual(x).tangent, DX)


def test_attention_is_outside_of_modes():
    """It makes many small calls, none of them with a dual tensor."""
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
