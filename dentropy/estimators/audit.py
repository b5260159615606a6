"""The on-policy audit: do the rollouts look like samples of the policy that scored them?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import column, entropy_ratio
from dentropy.estimators.reweighting import sequence_weights, token_log_ratios

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

THRESHOLD = 4.0
CAUSES = (
    "sampling at another temperature, with top-p or top-k, or from stale weights, or a shift between tokens and logits"
)
# So far from 1 a mean base weight matters, whatever its error.
WEIGHT_TOLERANCE = 0.01
# The two ways in which a mean base weight can be off.
TRUNCATED = (
    "this is the missing mass of a sampler that cannot produce all that the policy can (top-p, top-k or min-p), and no "
    "weights make up for it: its rollouts cannot stand for the policy's"
)
MISREPORTED = "usual causes: sampler_logp is of other tokens, of another temperature or of a policy that did not sample"
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

    Of rollouts of another sampler these are weighted means, and there are (else None)

    base_weight              mean of W_i − 1
    token_weight             mean of Σ_k (ρ_k − 1): minus the mass that the sampler cannot produce, per rollout
    token_logp_plus_entropy  mean of Σ_k ρ_k (logp_k + h_k), nats per rollout
    token_dlogp              mean of Σ_k ρ_k dlogp_k

    the last three from kept tokens. They hold whatever W_i, each token given what came before it.

    warnings: one sentence for each check beyond 4 standard errors; empty where nothing is wrong.
    """

    logp_plus_entropy: AuditCheck
    dlogp: AuditCheck | None
    warnings: list[str]
    base_weight: AuditCheck | None = None
    token_weight: AuditCheck | None = None
    token_logp_plus_entropy: AuditCheck | None = None
    token_dlogp: AuditCheck | None = None


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

    Of rollouts of another sampler, with base weights W_i = Π_k ρ_k, it is E[W_i] = 1, E[W_i (L_i + H_i)] = 0 and
    E[W_i ℓ'_i] = 0; the means are over Σ W_i. Of kept tokens E[ρ_k] = 1, E[ρ_k (logp_k + h_k)] = 0 and
    E[ρ_k dlogp_k] = 0, given the earlier ones, which the product of many ratios cannot drown. A mean weight is warned
    of where it is 0.01 or more from 1 besides.

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
    ratio = entropy_ratio(sums, "token", "sequence")
    weight = sequence_weights(sums)
    total = weight.sum()
    balance, warnings = _check(
        "logp + entropy", weight * (column(sums, "logp") + column(sums, "entropy")), ratio.doubts, CAUSES, total
    )
    score = None
    if sums.dlogp is not None:
        score, more = _check("dlogp", weight * column(sums, "dlogp"), ratio.doubts, DIRECTION_CAUSES, total)
        warnings += more
    found = {} if sums.sampler_logp is None else _of_sampler(sums, weight, ratio.doubts)
    warnings += [text for _, texts in found.values() for text in texts]
    more = {name: check for name, (check, _) in found.items()}
    return OnPolicyAudit(logp_plus_entropy=balance, dlogp=score, warnings=warnings, **more)


def _of_sampler(
    sums: SequenceSums, weight: np.ndarray, doubts: tuple[str, ...]
) -> dict[str, tuple[AuditCheck, list[str]]]:
    """The checks of rollouts of another sampler by name, and their warnings."""
    found = {"base_weight": _weight_check("base weight", weight - 1, doubts)}
    if sums.sampler_tokens is None:
        return found
    ratio, row = np.exp(token_log_ratios(sums)), np.repeat(np.arange(weight.size), sums.n_tokens.astype(np.int64))
    few_nats = entropy_ratio(sums, "token", "prefix").doubts

    def per_rollout(values: np.ndarray) -> np.ndarray:
        return np.bincount(row, weights=values, minlength=weight.size)

    logp, entropy = (np.asarray(values, dtype=np.float64) for values in sums.tokens[:2])
    found["token_weight"] = _weight_check("token weight", per_rollout(ratio - 1), few_nats)
    balance = per_rollout(ratio * (logp + entropy))
    found["token_logp_plus_entropy"] = _check("token logp + entropy", balance, few_nats, CAUSES, weight.size)
    if sums.tokens.dlogp is not None:
        score = per_rollout(ratio * np.asarray(sums.tokens.dlogp, dtype=np.float64))
        found["token_dlogp"] = _check("token dlogp", score, few_nats, DIRECTION_CAUSES, weight.size)
    return found


def _weight_check(name: str, values: np.ndarray, doubts: tuple[str, ...]) -> tuple[AuditCheck, list[str]]:
    """That of weights less 1, [S], which may be all 0."""
    if not values.any():
        return AuditCheck(mean=0.0, stderr=0.0, stderr_reason=None, z=0.0), []
    check, _ = _check(name, values, doubts, "", values.size)
    if check.z is None or abs(check.z) <= THRESHOLD or abs(check.mean) <= WEIGHT_TOLERANCE:
        return check, []
    what = {"base weight": "the mean is 1", "token weight": "their sum per rollout is its length"}[name]
    side = "below" if check.mean < 0 else "above"
    return check, [
        f"{name}: {abs(check.mean):.3g} {side} what it is in expectation ({what}), {abs(check.z):.1f} standard errors; "
        + (TRUNCATED if check.mean < 0 else MISREPORTED)
    ]


def _check(
    name: str, values: np.ndarray, doubts: tuple[str, ...], causes: str, total: float
) -> tuple[AuditCheck, list[str]]:
    """The check of `values` [S], whose expectations are 0, their sum over `total`, and its warnings."""
    mean, squares = float(values.sum() / total), float(np.sum(values**2))
    if squares == 0:
        doubts = ("every rollout has 0", *doubts)
    if doubts:
        return AuditCheck(mean=mean, stderr=None, stderr_reason=doubts[0], z=None), []
    lacking = max(0.0, -float(values.sum() * np.sum(values**3)) / squares)
    stderr = math.sqrt(squares + lacking) / total
    z, warnings = mean / stderr, []
    if abs(z) > THRESHOLD:
        warnings.append(
            f"{name}: the mean per rollout is {mean:.4g}, {abs(z):.1f} standard errors from 0, where "
            f"rollouts of this very policy have 0; usual causes: {causes}"
        )
    return AuditCheck(mean=mean, stderr=stderr, stderr_reason=None, z=z), warnings
