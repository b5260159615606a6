"""How many rollouts a wanted error bar would take."""

from __future__ import annotations

import math
from typing import NamedTuple

from dentropy.estimators.estimate import Statistic
from dentropy.estimators.groups import degrees_by_spread

# The normal quantile of 90%: the range given beside the number is from 10% to it.
QUANTILE_90 = 1.2815515655446004
# A value within this many of its standard errors of 0 has no size to be relative to.
RESOLVED = 2.0


class RolloutsNeeded(NamedTuple):
    """rollouts in all, of `groups` prompts.

    low, high   rollouts: the standard error that this follows from is itself an estimate, and the number that is
                really needed lies between these two in about eight cases of ten
    """

    rollouts: int
    groups: int
    low: int
    high: int


def rollouts_needed(
    estimate: Statistic, stderr: float | None = None, *, relative: float | None = None
) -> RolloutsNeeded:
    """Rollouts and prompts for which the standard error of `estimate` would come down (or up) to `stderr`.

    A squared standard error goes as 1/G with prompts drawn at "random" and as 1/S on a "fixed" set of
    prompts. So with r = (estimate.stderr / stderr)², G becomes r·G with as many rollouts per prompt as now,
    or, on fixed prompts, S becomes r·S; rounded up to whole prompts, or rollouts per prompt, two at least.
    The squared standard error is itself nearly σ²·χ²_f / f: low and high have r·f / χ²_f for r, at the 90% and the
    10% point of χ²_f. f is its degrees of freedom, or, where fewer, 2 / (Σ t² / (Σ t)² − 1/n), t the n terms that it is
    the sum of (one per prompt, or per rollout of fixed ones): the variance of χ²_f is that of these terms.

    Args:
        estimate: a slope, curvature, measurement or prediction.
        stderr: the wanted standard error, in its units.
        relative: the same as a fraction of |value|, in place of `stderr`.

    Raises:
        ValueError: not one of `stderr` and `relative`, one that is not a positive number, an estimate without a
            standard error, `relative` for a value within 2 standard errors of 0: its size is chance.

    Example:
        >>> import torch
        >>> from dentropy import sequence_sums, slope, token_stats
        >>> from dentropy.estimators import rollouts_needed
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 8, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0, 1, 3]), dlogits)
        >>> estimate = slope(sequence_sums(stats, torch.tensor([0, 3, 4, 6, 8])))
        >>> rollouts_needed(estimate, estimate.stderr / 3)
        RolloutsNeeded(rollouts=36, groups=36, low=17, high=235)
    """
    if (stderr is None) == (relative is None):
        raise ValueError(f"stderr: {stderr!r} with relative={relative!r}, expected one of the two")
    for name, wanted in (("stderr", stderr), ("relative", relative)):
        if wanted is not None and not (wanted > 0 and math.isfinite(wanted)):
            raise ValueError(f"{name}: {wanted!r}, expected a positive number")
    if estimate.stderr is None:
        raise ValueError(f"estimate: no standard error, expected one to start from: {estimate.stderr_reason}")
    if relative is not None:
        if abs(estimate.value) <= RESOLVED * estimate.stderr:
            raise ValueError(
                f"relative: of {estimate.value:.3g} ± {estimate.stderr:.2g}, which is not told apart from 0; expected "
                "such a target for a value beyond 2 standard errors, or `stderr` in the units of the estimate"
            )
        stderr = relative * abs(estimate.value)
    # 1e-9: a ratio that is a whole number but for rounding is not rounded up
    factor = (estimate.stderr / stderr) ** 2 * (1 - 1e-9)
    dof = _degrees_of_freedom(estimate)
    low, high = (estimate.groups.needed(factor * dof / _chi2(dof, z))[0] for z in (QUANTILE_90, -QUANTILE_90))
    return RolloutsNeeded(*estimate.groups.needed(factor), low=low, high=high)


def _degrees_of_freedom(estimate: Statistic) -> float:
    """Those of the squared standard error, as its own terms vary."""
    return min(estimate.dof, degrees_by_spread(estimate.groups.variance_terms(estimate.influence)))


def _chi2(dof: float, z: float) -> float:
    """The quantile of χ² at the normal quantile `z` (Wilson and Hilferty): to 7% from 2 degrees of freedom on.

    With one its lower tail is three times too small; a range from two prompts is wide either way.
    """
    spread = 2 / (9 * dof)
    return dof * (1 - spread + z * math.sqrt(spread)) ** 3
