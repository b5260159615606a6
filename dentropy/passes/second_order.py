"""Second derivatives from values: second differences of log-probabilities and entropies at weights to either side.

Passes without tangents are all they take, and where one measures at ±η anyway, none at all.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dentropy import large
from dentropy.stats.segments import PIECE
from dentropy.stats.tables import TokenStats

# The largest bend within a step, relative to the first derivatives, that passes for smooth.
MOSTLY_SMOOTH = 0.2


def difference_step(at: TokenStats, dtype: torch.dtype) -> float:
    """The step s in η that moves a typical log-probability or entropy by ε^(1/4)/3 nats, ε the unit of `dtype`.

    Values come with an error of some ε, their second difference over s² with ε/s²; what it leaves out grows with s².
    The two meet at ε^(1/4) or so: more than that for smooth policies, less for sharply curved ones. On small random
    models the second derivatives of a rollout are then off by 1 to 8% of their rms at most in float32 and by some
    millionths in float64, a curvature in float32 by hundredths of its standard error.

    Raises:
        ValueError: where the direction moves nothing, so that there is no scale.
    """
    speed = max((_square(x) / len(x)) ** 0.5 for x in (at.dlogp, at.dentropy))
    if speed == 0:
        raise ValueError(
            "direction: moves no log-probability and no entropy of this batch, so the step of the second "
            "difference has no scale; expected a direction that reaches the policy's output"
        )
    return torch.finfo(dtype).eps ** (1 / 4) / (3 * speed)


def bend(at: TokenStats, plus: TokenStats, minus: TokenStats, step: float) -> float:
    """How far the central differences of the values are from the first derivatives, relative to these.

    Over smooth values it is s² f'''/6 f', of one size with what the second difference leaves out, s² f''''/12 f''; a
    jump between the two sides (an expert chosen by rank, re-chosen) stands out.
    """
    off, size = 0.0, 0.0
    for columns in ((plus.logp, minus.logp, at.dlogp), (plus.entropy, minus.entropy, at.dentropy)):
        off += sum(float(((p - m) / (2 * step) - first).square().sum()) for p, m, first in _in_float64(*columns))
        size += _square(columns[2])
    return (off / size) ** 0.5


def doubt(at: TokenStats, plus: TokenStats, minus: TokenStats, step: float) -> str | None:
    """Why the second differences are no derivatives, in words; None where nothing speaks against them."""
    off = bend(at, plus, minus, step)
    if off <= MOSTLY_SMOOTH:
        return None
    return (
        f"values bend or jump within the step of {step:.1e} (first derivatives come out {off:.0%} off); the second "
        "order is unreliable, as it is for mixtures of experts whose routing flips, or in noise"
    )


def with_second_order(at: TokenStats, plus: TokenStats, minus: TokenStats, step: float) -> TokenStats:
    """`at` with (f(+s) − 2 f(0) + f(−s)) / s² for the second derivatives.

    Args:
        at: with first derivatives.
        plus, minus: the same tokens at weights moved by ±step.
        step: s > 0, in η.

    Example:
        >>> import torch
        >>> from dentropy import TokenStats
        >>> one = torch.ones(1)
        >>> at = TokenStats(logp=-one, entropy=one, dlogp=0.5 * one, dentropy=one)
        >>> plus, minus = (TokenStats(logp=-one + 0.5 * s + s**2, entropy=one + s) for s in (0.125, -0.125))
        >>> with_second_order(at, plus, minus, 0.125).d2logp.item()
        2.0
    """
    d2logp, d2entropy = (
        _second_difference(*columns, step)
        for columns in ((plus.logp, at.logp, minus.logp), (plus.entropy, at.entropy, minus.entropy))
    )
    return at._replace(d2logp=d2logp, d2entropy=d2entropy)


def _second_difference(plus: Tensor, at: Tensor, minus: Tensor, step: float) -> Tensor:
    found = large.column(len(at), at)
    for part, (p, x, m) in zip(found.split(PIECE), _in_float64(plus, at, minus), strict=True):
        part.copy_((p - x + (m - x)) / step**2)
    return found


def _square(column: Tensor) -> float:
    """Σ x²."""
    return sum(float(x.square().sum()) for (x,) in _in_float64(column))


def _in_float64(*columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A piece at a time."""
    for parts in zip(*(column.split(PIECE) for column in columns), strict=True):
        yield tuple(part.double() for part in parts)
