"""What stands beside dentropy: the truth, which is `dentropy.reference` in float64, and two peers in plain PyTorch."""

import torch
from torch.func import jvp

from dentropy import reference

GATE_ROWS = 8  # whose results are held against float64


def truth_of(logits, targets, *derivatives):
    """Every field that these inputs have, in float64, from the same rounded inputs."""
    stats = reference.token_stats(logits.double(), targets, *(x.double() for x in derivatives))
    return [field for field in stats if field is not None]


def closed_form(logits, targets, dlogits=None, d2logits=None):
    """A peer: the formulas as one writes them for finite logits, without softcap and temperature; float32."""
    logp = torch.log_softmax(logits.float(), -1)
    p, at = logp.exp(), targets[:, None]
    h = -(p * logp).sum(-1, keepdim=True)
    stats = (logp.gather(1, at)[:, 0], h[:, 0])
    if dlogits is None:
        return stats
    dz = dlogits.float()
    dlogp = dz - (p * dz).sum(-1, keepdim=True)
    stats += (dlogp.gather(1, at)[:, 0], -(p * dlogp * logp).sum(-1))
    if d2logits is None:
        return stats
    ddz = d2logits.float()
    ddlogp = ddz - (p * ddz).sum(-1, keepdim=True)
    variance = (p * dlogp * dlogp).sum(-1)
    third = (p * (logp + h) * dlogp * dlogp).sum(-1)
    return *stats, ddlogp.gather(1, at)[:, 0] - variance, -(variance + (p * logp * ddlogp).sum(-1) + third)


def forward_mode(logits, targets, *derivatives):
    """A peer: torch.func.jvp of log_softmax and entropy in float32; at second order nested, along a parabola."""

    def log_prob_and_entropy(z):
        logp = torch.log_softmax(z, -1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    z, *tangents = (x.float() for x in (logits, *derivatives))
    if not tangents:
        return log_prob_and_entropy(z)
    if len(tangents) == 1:
        values, first = jvp(log_prob_and_entropy, (z,), (tangents[0],))
        return *values, *first
    dz, ddz = tangents

    def first_order(t):
        return jvp(lambda s: log_prob_and_entropy(z + s * dz + s * s / 2 * ddz), (t,), (torch.ones_like(t),))

    zero = z.new_zeros(())
    (values, first), (_, second) = jvp(first_order, (zero,), (torch.ones_like(zero),))
    return *values, *first, *second


def gate_rows(n: int) -> torch.Tensor:
    """The rows that are checked: first and last among them."""
    return torch.linspace(0, n - 1, GATE_ROWS).long()
