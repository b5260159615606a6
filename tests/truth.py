"""What token statistics should be: `dentropy.reference` in float64, and how near to it float32 can come.

The reference itself is held against PyTorch's own forward-mode derivatives of log_softmax and entropy
(`plain_pytorch`), which in float32 are also what rounding costs anybody.
"""

import math

import torch
from torch.func import jvp

from dentropy import TokenStats, reference

FIELDS = TokenStats._fields


def along_the_path(eta, logits, dlogits=None, d2logits=None, *, temperature=1.0, softcap=None):
    """z at eta: the logits moved there along their derivatives, then softcap and temperature."""
    moved = logits
    for power, tangent in enumerate((dlogits, d2logits), start=1):
        if tangent is not None:
            moved = moved + eta**power / power * tangent
    if softcap is not None:
        moved = softcap * torch.tanh(moved / softcap)
    return moved / temperature


def values_and_derivatives(function, order, device):
    """What function(eta), a tuple, is at eta = 0, and its derivatives up to `order`: a list of tuples."""

    def first(eta):
        return jvp(function, (eta,), (torch.ones_like(eta),))

    eta = torch.zeros((), dtype=torch.float64, device=device)
    if order == 0:
        return [function(eta)]
    if order == 1:
        return list(first(eta))
    (values, derivatives), (_, second_derivatives) = jvp(first, (eta,), (torch.ones_like(eta),))
    return [values, derivatives, second_derivatives]


def plain_pytorch(logits, targets, *tangents, dtype=torch.float64, **transform):
    """The fields by name, two for each order of derivatives given, [N] in `dtype`, from inputs upcast to it.

    `fisher` is E (d log p / dη)² over the vocabulary, which is all finite here.
    """
    inputs = [tensor.to(dtype) for tensor in (logits, *tangents)]

    def log_probs(eta):
        return torch.log_softmax(along_the_path(eta.to(dtype), *inputs, **transform), -1)

    def log_prob_and_entropy(eta):
        logp = log_probs(eta)
        return logp.gather(-1, targets.long()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    orders = values_and_derivatives(log_prob_and_entropy, len(tangents), logits.device)
    found = dict(zip(FIELDS, (field for fields in orders for field in fields)))
    if tangents:
        (logp,), (score,) = values_and_derivatives(lambda eta: (log_probs(eta),), 1, logits.device)
        found["fisher"] = (logp.exp() * score.square()).sum(-1)
    return found


def reference_in_float64(function, *tensors, **inputs):
    """The fields that `dentropy.reference`'s function of that name gives, by name, from inputs upcast to float64."""

    def upcast(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    named = {name: upcast(value) for name, value in inputs.items()}
    stats = getattr(reference, function)(*map(upcast, tensors), **named)
    return {name: field for name, field in stats._asdict().items() if field is not None}


def assert_all_close(stats, truth, rtol):
    """Fields differ by `rtol` of the largest value of each; those that the truth does not have are None."""
    assert [name for name in FIELDS if getattr(stats, name) is not None] == list(truth)
    for name, want in truth.items():
        torch.testing.assert_close(
            getattr(stats, name).double(),
            want,
            rtol=rtol,
            atol=rtol * want.abs().amax().item() if want.numel() else 0.0,
            msg=lambda text: f"{name}: {text}",
        )


def spread(values):
    """Root mean square about each row's mean, [N]: the scale on which rounding errors are counted."""
    return (values - values.mean(-1, keepdim=True)).square().mean(-1).sqrt()


def scales(truth, logits, *tangents, **transform):
    """The size of the terms that each field is the sum of, [N], from the spreads of z, ż and z̈.

    In dlogp = ż_y − E ż the terms are as large as the spread of ż, in fisher = Var ż as its square, in
    dh = −Cov(z, ż) as that of z times that of ż; d2logp = z̈_y − E z̈ − Var ż and
    d2h = −[Var ż + Cov(z, z̈) + E (z − E z)(ż − E ż)²] in the same way.
    """
    inputs = [tensor.double() for tensor in (logits, *tangents)]
    orders = values_and_derivatives(
        lambda eta: (along_the_path(eta, *inputs, **transform),), len(tangents), logits.device
    )
    z, dz, d2z = ([spread(values) for (values,) in orders] + [torch.zeros(())] * 2)[:3]
    return {
        "logp": truth["logp"].abs(),
        "entropy": torch.tensor(math.log(logits.shape[-1])),
        "dlogp": dz,
        "dentropy": z * dz,
        "d2logp": d2z + dz**2,
        "d2entropy": z * d2z + dz**2 * (1 + z),
        "fisher": dz**2,
    }


def assert_as_accurate_as_plain_pytorch(stats, logits, targets, *tangents, **transform):
    """Largest error over the rows: at most twice PyTorch's in float32, plus 4 float32 units of the scale."""
    truth = reference_in_float64("token_stats", logits, targets, *tangents, **transform)
    plain = plain_pytorch(logits, targets, *tangents, dtype=torch.float32, **transform)
    scale = scales(truth, logits, *tangents, **transform)
    unit = torch.finfo(torch.float32).eps
    for name, want in truth.items():
        error = (getattr(stats, name).double() - want).abs().max()
        allowed = 2 * (plain[name].double() - want).abs().max() + 4 * unit * scale[name].max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
