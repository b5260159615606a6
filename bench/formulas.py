"""The token statistics in plain PyTorch, as one would write them: what is compared with, and the truth."""

import torch
from torch.func import jvp

GATE_ROWS = 8  # whose results are held against float64


def upcast(tensor):
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def closed_form(logits, targets, dlogits=None, d2logits=None):
    """The formulas of `TokenStats`, written down; float32, or float64 where the logits are."""
    logp = torch.log_softmax(upcast(logits), -1)
    p, at = logp.exp(), targets[:, None]
    h = -(p * logp).sum(-1, keepdim=True)
    stats = (logp.gather(1, at)[:, 0], h[:, 0])
    if dlogits is None:
        return stats
    dz = upcast(dlogits)
    dlogp = dz - (p * dz).sum(-1, keepdim=True)
    stats += (dlogp.gather(1, at)[:, 0], -(p * dlogp * logp).sum(-1))
    if d2logits is None:
        return stats
    ddz = upcast(d2logits)
    ddlogp = ddz - (p * ddz).sum(-1, keepdim=True)
    variance = (p * dlogp * dlogp).sum(-1)
    third = (p * (logp + h) * dlogp * dlogp).sum(-1)
    return *stats, ddlogp.gather(1, at)[:, 0] - variance, -(variance + (p * logp * ddlogp).sum(-1) + third)


def forward_mode(logits, targets, dlogits=None, d2logits=None):
    """torch.func.jvp of log_softmax and entropy; nested, along a parabola in logits, at second order."""

    def log_prob_and_entropy(z):
        logp = torch.log_softmax(z, -1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    z, dz, ddz = upcast(logits), upcast(dlogits), upcast(d2logits)
    if dlogits is None:
        return log_prob_and_entropy(z)
    if d2logits is None:
        values, derivatives = jvp(log_prob_and_entropy, (z,), (dz,))
        return *values, *derivatives

    def first_order(t):
        return jvp(lambda s: log_prob_and_entropy(z + s * dz + s * s / 2 * ddz), (t,), (torch.ones_like(t),))

    zero = z.new_zeros(())
    (values, derivatives), (_, second) = jvp(first_order, (zero,), (torch.ones_like(zero),))
    return *values, *derivatives, *second


def gate_rows(n: int) -> torch.Tensor:
    """The rows that are checked: first and last among them."""
    return torch.linspace(0, n - 1, GATE_ROWS).long()
