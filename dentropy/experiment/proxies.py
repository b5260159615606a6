"""What a run says of published proxies: how far each agrees with the exact shares of the update's tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dentropy.estimators.proxies import ProxyGrade, grade_proxy, update_proxies
from dentropy.experiment.changes import Change
from dentropy.passes.mean_discriminant import mean_discriminant
from dentropy.passes.policy_gradient import PolicyGradientStep
from dentropy.passes.update_attribution import UpdateAttribution
from dentropy.rollouts.batch import PackedBatch

GRADED = 256  # of the update's rollouts, at even distances where there are more: an interval of a few hundredths
MEASURES = ("rank_correlation", "r_squared", "sign_agreement")


def graded_rollouts(batch: PackedBatch, most: int = GRADED) -> np.ndarray:
    """Those of an update whose tokens proxies are graded on."""
    return np.arange(0, len(batch), -(-len(batch) // most))


def grades(
    update: PolicyGradientStep, found: UpdateAttribution, *, most: int = GRADED, **settings
) -> dict[str, ProxyGrade]:
    """Each proxy graded on at most so many rollouts, by the shares of their tokens that have a weight in the loss.

    It takes a plain pass over these rollouts; settings are token_budget and progress. A proxy that is the same at all
    tokens has no grade, and none has where the shares are.
    """
    rows = graded_rollouts(found.batch, most)
    inside = np.isin(found.rollout, rows)
    expected = mean_discriminant(update.policy, found.batch.take(rows), **settings)
    proxies = update_proxies(found.advantage[inside], found.logp[inside], found.entropy[inside], expected)
    weighted = found.weight[inside] != 0
    share, group = found.share[inside][weighted], found.batch.group[found.rollout[inside][weighted]]
    return {
        name: grade_proxy(proxy[weighted], share, group, found.reliability)
        for name, proxy in proxies.items()
        if share.size and np.ptp(share) and np.ptp(proxy[weighted])
    }


def entry(found: dict[str, ProxyGrade], changes: Sequence[Change], step_size: float) -> list[dict]:
    """`proxies` of results.json."""
    delta = _sign_of_delta(changes, step_size)
    return [
        {
            "name": name,
            **{measure: _agreement(getattr(grade, measure)) for measure in MEASURES},
            "mean": grade.mean,
            "mean_interval": None if grade.mean_interval is None else list(grade.mean_interval),
            "right_sign": None if not delta * _sign(grade.mean_interval) else delta == _sign(grade.mean_interval),
        }
        for name, grade in found.items()
    ]


def _sign_of_delta(changes: Sequence[Change], step_size: float) -> int:
    """Of ΔH measured at the update itself; 0 where it was not, or is not told apart from 0."""
    for change in changes:
        if math.isclose(change.eta, step_size, rel_tol=1e-9):
            doubtful = change.below_noise or change.diagnostics.verdict == "unusable"
            return 0 if doubtful else _sign(change.measured.interval())
    return 0


def _sign(interval: tuple[float, float] | None) -> int:
    """1 or −1 of all that an interval holds; 0 where it holds 0 or is none."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return 0
    return 1 if interval[0] > 0 else -1


def _agreement(found) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(found).items()}
