"""What a run says of published proxies: how far each agrees with the exact shares of the update's tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dentropy.estimators import ProxyGrade, grade_proxy, update_proxies
from dentropy.experiment.changes import Change
from dentropy.passes.update_attribution import UpdateAttribution

MEASURES = ("rank_correlation", "r_squared", "sign_agreement")


def grades(found: UpdateAttribution, mean_discriminant: np.ndarray) -> dict[str, ProxyGrade]:
    """Each proxy graded on the tokens that have a weight in the loss, but those that are the same at all of them."""
    inside, share = found.weight != 0, found.share
    group = found.batch.group[found.rollout]
    proxies = update_proxies(found.advantage, found.logp, found.entropy, mean_discriminant)
    if not np.ptp(share[inside]):
        return {}
    return {
        name: grade_proxy(proxy[inside], share[inside], group[inside], found.reliability)
        for name, proxy in proxies.items()
        if np.ptp(proxy[inside])
    }


def entry(found: dict[str, ProxyGrade], changes: Sequence[Change], step_size: float) -> list[dict]:
    """`proxies` of results.json."""
    measured = next((c for c in changes if math.isclose(c.eta, step_size, rel_tol=1e-9)), None)
    return [
        {
            "name": name,
            **{measure: _agreement(getattr(grade, measure)) for measure in MEASURES},
            "mean": grade.mean,
            "right_sign": None if not _told_apart(measured) else bool(grade.mean * measured.measured.delta > 0),
        }
        for name, grade in found.items()
    ]


def _told_apart(change: Change | None) -> bool:
    """Whether ΔH at the update itself is measured to be other than 0."""
    if change is None or change.below_noise or change.diagnostics.verdict == "unusable":
        return False
    ends = change.measured.interval()
    return ends is not None and not ends[0] <= 0 <= ends[1]


def _agreement(found) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(found).items()}
