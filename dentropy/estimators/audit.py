"""The on-policy audit: do the rollouts look like samples of the policy that scored them?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import column, entropy_ratio
from dentropy.estimators.groups import Groups

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

THRESHOLD = 4.0
CAUSES = (
    "sampling at another temperature, with top-p or top-k, or from stale weights, or a shift between tokens and logits"
)


@dataclass(frozen=True)
class AuditCheck:
    """A mean over rollouts whose expectation is 0, its standard error by prompt group, and z = mean / stderr.

    stderr and z are None, with stderr_reason in words, where the groups do not allow a standard error.
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
    E[L_i + H_i] = 0 and E[ℓ'_i] = 0. The standard errors are clustered by prompt group, z = mean / stderr,
    and |z| > 4 is a warning: a reason to look at the sampler; no warning is no proof. On a nearly
    deterministic policy, where all of L_i + H_i rests on rare tokens, look at the mean beside z.

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
    ratio, groups = entropy_ratio(sums, "token"), Groups.of(sums.group)
    warnings: list[str] = []
    balance = _check("logp + entropy", column(sums, "logp") + ratio.entropy, groups, warnings)
    score = None if sums.dlogp is None else _check("dlogp", column(sums, "dlogp"), groups, warnings)
    return OnPolicyAudit(logp_plus_entropy=balance, dlogp=score, warnings=warnings)


def _check(name: str, values: np.ndarray, groups: Groups, warnings: list[str]) -> AuditCheck:
    mean = float(values.mean())
    stderr, reason = groups.stderr((values - mean) / values.size)
    if stderr == 0:
        stderr, reason = None, "every group has the same sum"
    z = None if stderr is None else mean / stderr
    if z is not None and abs(z) > THRESHOLD:
        warnings.append(
            f"{name}: the mean per rollout is {mean:.4g}, {abs(z):.1f} standard errors from 0, where "
            f"rollouts of this very policy have 0; usual causes: {CAUSES}"
        )
    return AuditCheck(mean=mean, stderr=stderr, stderr_reason=reason, z=z)
