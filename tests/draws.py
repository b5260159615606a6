"""Random inputs of the token statistics and of their sums, the same at every call."""

import torch

from dentropy import TokenStats

TRANSFORMS = [{}, dict(temperature=0.6), dict(softcap=3.0), dict(softcap=3.0, temperature=1.7)]
MOVING = [("dhidden",), ("dweight",), ("dbias",), ("dhidden", "dweight"), ("dhidden", "dweight", "dbias")]


def logits_and_tangents(rows=6, vocabulary=300, dtype=torch.float64):
    """logits, targets, dlogits, d2logits."""
    generator = torch.Generator().manual_seed(0)
    logits, dlogits, d2logits = torch.randn(3, rows, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return (2 * logits).to(dtype), targets, dlogits.to(dtype), d2logits.to(dtype)


def head(dtype=torch.float64, rows=9, width=16, vocabulary=77, moving=MOVING[-1]):
    """hidden, weight, bias, the tangents of those that move and targets, by the names of the arguments."""
    generator = torch.Generator().manual_seed(1)
    shapes = dict(hidden=(rows, width), weight=(vocabulary, width), bias=(vocabulary,))
    drawn = {
        prefix + name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
        for prefix in ("", "d")
    }
    drawn["targets"] = torch.randint(vocabulary, (rows,), generator=generator)
    return {name: drawn[name] for name in (*shapes, *moving, "targets")}


def token_values(n_tokens, order=2, dtype=torch.float32, seed=0):
    """TokenStats of normal values, up to sign what statistics can be."""
    values = torch.randn(7, n_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[0], values[1], values[6] = -values[0].abs(), values[1].abs(), values[6].abs()
    *values, fisher = values.to(dtype)
    return TokenStats(*values[: 2 + 2 * order], fisher=fisher if order else None)
