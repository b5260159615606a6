"""How many rollouts a wanted error bar would take."""

from __future__ import annotations

import math
from typing import NamedTuple

from dentropy.estimators.estimate import Statistic


class RolloutsNeeded(NamedTuple):
    """rollouts in all, of `groups` prompts."""

    rollouts: int
    groups: int


def rollouts_needed(estimate: Statistic, stderr: float) -> RolloutsNeeded:
    """Rollouts and prompts for which the standard error of `estimate` would come down (or up) to `stderr`.

    A squared standard error goes as 1/G with prompts drawn at "random" and as 1/S on a "fixed" set of
    prompts. So with r = (estimate.stderr / stderr)², G becomes r·G with as many rollouts per prompt as now,
    or, on fixed prompts, S becomes r·S; rounded up to whole prompts, or rollouts per prompt, two at least.

    Args:
        estimate: a slope, curvature, measurement or prediction.
        stderr: the wanted standard error, in its units.

    Raises:
        ValueError: a `stderr` that is not a positive number, an estimate without a standard error.

    Example:
        >>> import torch
        >>> from dentropy import sequence_sums, slope, token_stats
        >>> from dentropy.estimators import rollouts_needed
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 8, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0, 1, 3]), dlogits)
        >>> estimate = slope(sequence_sums(stats, torch.tensor([0, 3, 4, 6, 8])))
        >>> rollouts_needed(estimate, estimate.stderr / 3)
        RolloutsNeeded(rollouts=36, groups=36)
    """
    if not (stderr > 0 and math.isfinite(stderr)):
        raise ValueError(f"stderr: {stderr!r}, expected a positive number")
    if estimate.stderr is None:
        raise ValueError(f"estimate: no standard error, expected one to start from: {estimate.stderr_reason}")
    # 1e-9: a ratio that is a whole number but for rounding is not rounded up
    factor = (estimate.stderr / stderr) ** 2 * (1 - 1e-9)
    return RolloutsNeeded(*estimate.groups.needed(factor))
