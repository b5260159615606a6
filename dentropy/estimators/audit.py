"""The on-policy audit: do the rollouts look like samples of the policy that scored them?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import column, entropy_ratio

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

THRESHOLD = 4.0
CAUSES = (
    "sampling at another temperature, with top-p or top-k, or from stale weights, or a shift between tokens and logits"
)
# The direction cannot move logp + entropy; it moves ℓ' where it was made to raise or lower these very tokens.
DIRECTION_CAUSES = f"{CAUSES}, or an update made from these very rollouts"


@dataclass(frozen=True)
class AuditCheck:
    """A mean over rollouts whose expectation is 0, its standard error, and z = mean / stderr.

    stderr and z are None, with stderr_reason in words, where the rollouts are too sure of themselves for one.
    """

    mean: float
    stderr: float | None
    stderr_reason: str | None
    z: float | None


@dataclass(frozen=True)
class OnPolicyAudit:
    """logp_plus_entropy: mean of L_i + H_i, nats per rollout. dlogp: mean of ℓ'_i, or None without a tangent.

    warnings: one sentence for each check beyond 4 standard errors; empty where nothing is wrong.
    """

    logp_plus_entropy: AuditCheck
    dlogp: AuditCheck | None
    warnings: list[str]


def on_policy_audit(sums: SequenceSums) -> OnPolicyAudit:
    """Check a table against what holds for rollouts of the very policy that scored them.

    For each token E[logp_k + h_k | earlier tokens] = 0 and E[dlogp_k | earlier tokens] = 0, so per rollout
    E[L_i + H_i] = 0 and E[ℓ'_i] = 0, whatever its prompt: given their prompts rollouts are independent, and the
    squared standard error of a mean of S values v_i that have the mean 0 is Σ v_i² / S², with one prompt as with many.
    Where values are skewed against the sign of their sum it is (Σ v² − Σ v Σ v³ / Σ v²) / S²: then large values of the
    other sign are fewer than expected, and Σ v² lacks them. (Of equally large rare values, K drawn and λ expected:
    the first form is K, the second λ, which is the variance of K.) z = mean / stderr, and |z| > 4 is a warning: a
    reason to look at the sampler; no warning is no proof. There is no z where the rollouts hold so little entropy that
    the rare tokens on which all of it rests may be missing.

    Args:
        sums: a table, [S] float64, with or without tangent columns.

    Returns:
        OnPolicyAudit; means in nats per rollout (dlogp: per unit of η).

    Raises:
        ValueError: no rollout or no token at all, a value that is not finite (the rollout is named).

    Example:
        >>> import torch
        >>> from dentropy import on_policy_audit, sequence_sums, token_stats
        >>> logits = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)).double()
        >>> ends = torch.arange(0, 2001, 10)
        >>> greedy = sequence_sums(token_stats(logits, logits.argmax(-1)), ends)
        >>> [warning.split(":")[0] for warning in on_policy_audit(greedy).warnings]
        ['logp + entropy']
    """
    ratio = entropy_ratio(sums, "token")
    balance, warnings = _check("logp + entropy", column(sums, "logp") + ratio.entropy, ratio.doubts, CAUSES)
    score = None
    if sums.dlogp is not None:
        score, more = _check("dlogp", column(sums, "dlogp"), ratio.doubts, DIRECTION_CAUSES)
        warnings += more
    return OnPolicyAudit(logp_plus_entropy=balance, dlogp=score, warnings=warnings)


def _check(name: str, values: np.ndarray, doubts: tuple[str, ...], causes: str) -> tuple[AuditCheck, list[str]]:
    """The check of `values` [S], whose expectations are 0, and its warnings."""
    mean, squares = float(values.mean()), float(np.sum(values**2))
    if squares == 0:
        doubts = ("every rollout has 0", *doubts)
    if doubts:
        return AuditCheck(mean=mean, stderr=None, stderr_reason=doubts[0], z=None), []
    lacking = max(0.0, -float(values.sum() * np.sum(values**3)) / squares)
    stderr = math.sqrt(squares + lacking) / values.size
    z, warnings = mean / stderr, []
    if abs(z) > THRESHOLD:
        warnings.append(
            f"{name}: the mean per rollout is {mean:.4g}, {abs(z):.1f} standard errors from 0, where "
            f"rollouts of this very policy have 0; usual causes: {causes}"
        )
    return AuditCheck(mean=mean, stderr=stderr, stderr_reason=None, z=z), warnings
