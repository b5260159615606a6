"""What token statistics should be: PyTorch's own forward-mode derivatives of log_softmax and entropy."""

import math

import torch
from torch.func import jvp

FIELDS = ("logp", "entropy", "dlogp", "dentropy", "d2logp", "d2entropy")


def plain_pytorch(logits, targets, dlogits, d2logits=None, *, temperature=1.0, softcap=None,
                  dtype=torch.float64):
    """The six fields by name (four without d2logits), [N] in `dtype`, from the inputs upcast to it."""
    z, dz = logits.to(dtype), dlogits.to(dtype)
    d2z = None if d2logits is None else d2logits.to(dtype)

    def log_prob_and_entropy(eta):
        moved = z + eta * dz if d2z is None else z + eta * dz + eta * eta / 2 * d2z
        if softcap is not None:
            moved = softcap * torch.tanh(moved / softcap)
        logp = torch.log_softmax(moved / temperature, -1)
        return logp.gather(-1, targets.long()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def first(eta):
        return jvp(log_prob_and_entropy, (eta,), (torch.ones_like(eta),))

    eta = torch.zeros((), dtype=dtype)
    if d2z is None:
        values, derivatives = first(eta)
        return dict(zip(FIELDS, values + derivatives))
    (values, derivatives), (_, second_derivatives) = jvp(first, (eta,), (torch.ones_like(eta),))
    return dict(zip(FIELDS, values + derivatives + second_derivatives))


def spread(values):
    """Root mean square about each row's mean, [N]: the scale on which rounding errors are counted."""
    values = values.double()
    return (values - values.mean(-1, keepdim=True)).square().mean(-1).sqrt()


def assert_as_accurate_as_plain_pytorch(stats, logits, targets, dlogits, *, only=FIELDS, **transform):
    """Largest error over the rows: at most twice PyTorch's in float32, plus 4 float32 units of the scale."""
    truth = plain_pytorch(logits, targets, dlogits, **transform)
    plain = plain_pytorch(logits, targets, dlogits, dtype=torch.float32, **transform)
    unit = torch.finfo(torch.float32).eps
    temperature = transform.get("temperature", 1.0)
    z, dz = spread(logits) / temperature, spread(dlogits) / temperature
    scale = {"logp": truth["logp"].abs(), "entropy": torch.tensor(math.log(logits.shape[-1])),
             "dlogp": dz, "dentropy": z * dz}
    for name in (n for n in truth if n in only):
        error = (getattr(stats, name).double() - truth[name]).abs().max()
        allowed = 2 * (plain[name].double() - truth[name]).abs().max() + 4 * unit * scale[name].max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
