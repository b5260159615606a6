"""Fieller's interval for a ratio of two estimates from the same rollouts."""

from __future__ import annotations

import numpy as np

from dentropy.estimators.estimate import Statistic
from dentropy.estimators.optional import load


def fieller(top: Statistic, bottom: Statistic, level: float = 0.95) -> tuple[float, float] | None:
    """The interval of ρ = s_a / s_b: with variances and covariance from the influence values, clustered by prompt,

        {ρ : (s_a − ρ s_b)² ≤ t² (V_a − 2ρ V_ab + ρ² V_b)} ,

    the ratios that are not told apart from the two: no ratio's distribution is assumed normal.

    Args:
        top, bottom: with standard errors, of the same rollouts and `prompts`.
        level: of the interval.

    Returns:
        Both ends; None where s_b is not told apart from 0 (s_b² ≤ t² V_b): the set then has no bounds.
    """
    groups = bottom.groups
    t = float(load("scipy.special", "an interval").stdtrit(min(top.dof, bottom.dof), (1 + level) / 2))

    def variance(influence: np.ndarray) -> float:
        return float(groups.variance_terms(influence).sum())

    scale = _spread(top.influence), _spread(bottom.influence)
    a, b = top.influence / scale[0], bottom.influence / scale[1]
    covariance = (variance(a + b) - variance(a - b)) / 4 * scale[0] * scale[1]
    square = bottom.value**2 - t**2 * variance(bottom.influence)
    middle = top.value * bottom.value - t**2 * covariance
    constant = top.value**2 - t**2 * variance(top.influence)
    if square <= 0:
        return None
    root = max(middle**2 - square * constant, 0.0) ** 0.5
    return (middle - root) / square, (middle + root) / square


def _spread(influence: np.ndarray) -> float:
    """Their largest size, so that neither of two drowns in the other's rounding; 1 where all are 0."""
    return float(np.abs(influence).max()) or 1.0
