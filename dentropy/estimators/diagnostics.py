"""Can an importance-sampling measurement be believed? Pareto k̂, mean weight, and a verdict in words.

Pareto-smoothed importance sampling is of Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance
sampling", JMLR 25 (2024); the fit is arviz-stats'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.optional import load

if TYPE_CHECKING:
    from dentropy.estimators.importance_sampling import ImportanceResult

# A generalized Pareto tail of k > 1 has no mean: there is nothing for an average to converge to.
NO_MEAN = 1.0
# From fewer rollouts the standard error is itself uncertain by a quarter or more (1/sqrt(2·9)).
LEAST_ESS = 10.0
# Below half, the measurement is as noisy as one from less than half the rollouts; intervals keep their level
# well above it and fall short of it increasingly below.
STRAINED_FRACTION = 0.5
# From here on the weights' variance is at most a ninth of their squared mean, whatever their tail, and k̂ sorts out
# nothing: intervals keep their level, and discrete, almost equal weights have a k̂ above 1 with no tail at all.
NEARLY_EQUAL_FRACTION = 0.9
# Standard errors between the mean weight and 1, and the difference that is too small to matter.
MEAN_WEIGHT_Z = 3.0
MEAN_WEIGHT_TOLERANCE = 0.01
# More than half of what the moved policy does is where no rollout is.
LEAST_MEAN_WEIGHT = 0.5
# arviz-stats fits the largest fifth of the values, and needs five.
FEWEST_ROLLOUTS = 25
# Log-weights this close differ by the rounding of float64 sums alone.
ROUNDING = 1e-9
# Entropies per token this close, relative to the largest, differ by the rounding of float32 alone.
SAME_ENTROPY = 1e-6
PRODUCTS = ("w", "w·T", "w·H")


@dataclass(frozen=True, eq=False, kw_only=True)
class ImportanceDiagnostics:
    """What the weights say about a measured ΔH(η).

    verdict               "reliable", "strained" or "unusable"
    reason                the number that decided, in words
    khat                  shape k̂ of the tail of w (generalized Pareto; moments of order 1/k and above do not
                          exist); None with khat_reason
    khat_tokens           the same of w_i·T_i, the denominator's terms (T_i is 1 with per="sequence"); None where
                          these are 1, with prefix weights per sequence
    khat_entropy          the same of w_i·H_i(η), the numerator's terms
    khat_reason           why a k̂ is None, in words: "not needed" where the weights are equal
    khat_threshold        min(1 − 1/log10 S, 0.7): above it S rollouts are too few for the tail
    mean_weight_stderr    standard error of the mean weight, clustered by prompt; None where the groups do not
                          allow one
    mean_weight_z         (mean weight − 1) / its standard error; None without one, or where it is 0
    smoothed_delta        ΔH with Pareto-smoothed weights, beside the raw one; None where khat is
    smoothed_log_weights  float64 [S], the logarithms of those weights, which sum to 1; None where khat is
    """

    verdict: str
    reason: str
    khat: float | None
    khat_tokens: float | None
    khat_entropy: float | None
    khat_reason: str | None
    khat_threshold: float
    mean_weight_stderr: float | None
    mean_weight_z: float | None
    smoothed_delta: float | None
    smoothed_log_weights: np.ndarray | None


def importance_diagnostics(measured: ImportanceResult) -> ImportanceDiagnostics:
    """Judge a measurement by its weights. Nothing is clipped and the measurement itself is not touched.

    The verdict is the first that holds of

        unusable  ΔH not 0 with one and the same moved entropy per token in every rollout: the rollouts are copies of
                  one, or the moved policy is uniform, as when η is so large that the arithmetic overflows; ESS of w or
                  of w·T below 10; a k̂ above 1; a mean weight below 0.5, beyond 3 standard errors
        strained  a k̂ above its threshold; ESS below half of the rollouts; with prefix weights, an ESS at the worst
                  position below 10 of all rollouts; a mean weight more than 1% and 3 standard errors from 1;
                  raw and smoothed ΔH more than a standard error apart; no k̂
        reliable  otherwise

    where k̂ (its absence, and smoothed weights) do not count once the ESS is 90% of the rollouts. It is said of the
    weights: whether ΔH differs from 0 is for its standard error to say.

    Args:
        measured: what `importance` gave.

    Returns:
        ImportanceDiagnostics; deltas in nats per token (or per sequence).

    Raises:
        ImportError: without arviz-stats.

    Example:
        >>> import torch
        >>> from dentropy import importance, sequence_sums, token_stats
        >>> from dentropy.estimators import importance_diagnostics
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 200, 5, generator=seeded, dtype=torch.float64)
        >>> targets, ends = torch.multinomial(logits.softmax(-1), 1)[:, 0], torch.arange(0, 201, 5)
        >>> base = sequence_sums(token_stats(logits, targets), ends)
        >>> moved = sequence_sums(token_stats(logits + 3 * dlogits, targets), ends)
        >>> importance_diagnostics(importance(base, base)).khat_reason
        'not needed: all weights are equal'
        >>> importance_diagnostics(importance(base, moved)).verdict
        'unusable'
    """
    with np.errstate(divide="ignore"):  # a rollout without tokens, or without entropy, has the logarithm −inf
        factors = [0.0, np.log(measured.size), np.log(np.abs(measured.moved_entropy))]
    if np.ptp(measured.log_weights) < ROUNDING:
        fits = [(None, None, "not needed: all weights are equal")] * 3
    else:
        fits = [pareto_smooth(measured.log_weights + factor) for factor in factors]
        if measured.weights == "prefix" and measured.per == "sequence":
            fits[1] = None, None, fits[0][2]  # the denominator is S, which has no tail
    smoothed, khat, reason = fits[0]
    if len({why for _, _, why in fits}) > 1:
        reason = "; ".join(f"{name}: {fit[2]}" for name, fit in zip(PRODUCTS, fits, strict=True) if fit[2])
    mean_weight_stderr, mean_weight_z = _mean_weight_error(measured)
    found = ImportanceDiagnostics(
        verdict="",
        reason="",
        khat=khat,
        khat_tokens=fits[1][1],
        khat_entropy=fits[2][1],
        khat_reason=reason,
        khat_threshold=min(1 - 1 / math.log10(max(measured.n, 2)), 0.7),
        mean_weight_stderr=mean_weight_stderr,
        mean_weight_z=mean_weight_z,
        smoothed_delta=None if smoothed is None else _delta(measured, smoothed),
        smoothed_log_weights=smoothed,
    )
    verdict, reason = _verdict(measured, found)
    return replace(found, verdict=verdict, reason=reason)


def pareto_smooth(log_weights: np.ndarray) -> tuple[np.ndarray | None, float | None, str | None]:
    """(Pareto-smoothed log-weights [S], k̂, None), or (None, None, the reason) where no tail can be fitted.

    The tail is the largest S/5 weights, 3·sqrt(S) of them from S = 225 on.
    """
    stats = load("arviz_stats.base", "the Pareto k̂").array_stats
    count = log_weights.size
    weights = np.sort(np.exp(log_weights - log_weights.max()))
    if weights[0] == weights[-1]:
        return None, None, "all values are equal"
    if count < FEWEST_ROLLOUTS:
        return None, None, f"{count} rollouts are too few for a tail, {FEWEST_ROLLOUTS} are needed"
    tail = int(count / 5 if count <= 225 else 3 * math.sqrt(count))
    # The fit takes its scale from the tail's first quartile above the largest weight outside.
    if weights[count - tail + int(tail / 4 + 0.5) - 1] == weights[count - tail - 1]:
        return None, None, "too many equal weights where the tail begins"
    if weights[-tail] == weights[-1]:
        return None, None, f"the largest {tail} weights are equal"
    smoothed, khat = stats.psislw(-log_weights)
    if not (np.isfinite(khat) and np.isfinite(smoothed[log_weights > -np.inf]).all()):
        return None, None, "the fit of the tail did not converge"
    return smoothed, float(khat), None


def _delta(measured: ImportanceResult, log_weights: np.ndarray) -> float:
    """ΔH with other weights."""
    weights = np.exp(log_weights - log_weights.max())
    centred = measured.moved_entropy - measured.base_value * measured.size
    return float(np.sum(weights * centred) / np.sum(weights * measured.size))


def _mean_weight_error(measured: ImportanceResult) -> tuple[float | None, float | None]:
    """Standard error of the mean weight, and z; both worked out on weights that cannot overflow."""
    shift = measured.log_weights.max()
    weights = np.exp(measured.log_weights - shift)
    mean = weights.mean()
    stderr, _ = measured.groups.stderr((weights - mean) / weights.size)
    if stderr is None or stderr == 0 or np.ptp(measured.log_weights) < ROUNDING:
        return stderr, None
    with np.errstate(over="ignore"):
        return float(stderr * np.exp(shift)), float((mean - np.exp(-shift)) / stderr)


def _verdict(measured: ImportanceResult, found: ImportanceDiagnostics) -> tuple[str, str]:
    """The verdict and the number that decided, in words; see `importance_diagnostics`."""
    khats = zip((found.khat, found.khat_tokens, found.khat_entropy), PRODUCTS, strict=True)
    khat, product = max(((k, name) for k, name in khats if k is not None), default=(-math.inf, ""))
    if measured.ess_fraction >= NEARLY_EQUAL_FRACTION:
        khat = -math.inf
    ess, weight = min((measured.ess, "w"), (measured.ess_tokens, "w·T"))
    z = found.mean_weight_z
    if z is None:  # an error of 0: every weight, or every group's, is the same
        z = 0.0 if found.mean_weight_stderr is None else math.inf
    off = abs(z) > MEAN_WEIGHT_Z and abs(measured.mean_weight - 1) > MEAN_WEIGHT_TOLERANCE
    distance = "the same in every group" if math.isinf(z) else f"{abs(z):.1f} standard errors from 1"
    mean = f"the mean weight is {measured.mean_weight:.3g}, {distance}"

    if _says_the_same(measured):
        return "unusable", (
            "every rollout has the same entropy per token at this η: they are copies of one, or the moved policy is "
            "uniform (an η so large that the arithmetic overflows makes it so)"
        )
    if ess < LEAST_ESS:
        return "unusable", f"the ESS of {weight} is {ess:.1f} of {measured.n} rollouts, below {LEAST_ESS:g}"
    if khat > NO_MEAN:
        return "unusable", f"k̂ of {product} is {khat:.2f}, above 1: a tail without a mean"
    if off and measured.mean_weight < LEAST_MEAN_WEIGHT:
        return "unusable", f"{mean}: the rollouts miss most of what the moved policy does"
    if khat > found.khat_threshold:
        return "strained", (
            f"k̂ of {product} is {khat:.2f}, above {found.khat_threshold:.2f}: {measured.n} rollouts are few "
            "for such a tail"
        )
    if measured.ess_fraction < STRAINED_FRACTION:
        return "strained", f"the ESS is {measured.ess_fraction:.0%} of {measured.n} rollouts, below a half"
    if measured.weights == "prefix" and measured.worst_ess_fraction * measured.n < LEAST_ESS:
        return "strained", (
            f"the ESS at token position {measured.worst_position} is {measured.worst_ess_fraction:.1%} of the rollouts "
            f"that have it, {LEAST_ESS:g} of {measured.n} are needed"
        )
    if off:
        return "strained", mean
    doubt = None if measured.ess_fraction >= NEARLY_EQUAL_FRACTION else _tail_doubt(measured, found)
    if doubt is not None:
        return "strained", doubt
    tail = "" if khat == -math.inf else f", the largest k̂ {khat:.2f} below {found.khat_threshold:.2f}"
    return "reliable", f"the ESS is {measured.ess_fraction:.1%} of {measured.n} rollouts{tail}"


def _says_the_same(measured: ImportanceResult) -> bool:
    """Whether the entropy changed, and then to one and the same value per token in every rollout."""
    counted = measured.size > 0
    rates = measured.moved_entropy[counted] / measured.size[counted]
    same = np.ptp(rates) <= SAME_ENTROPY * np.abs(rates).max()
    return bool(same and abs(measured.delta) > SAME_ENTROPY * abs(measured.base_value))


def _tail_doubt(measured: ImportanceResult, found: ImportanceDiagnostics) -> str | None:
    """What is strained where no k̂ is too large: there is none, or smoothing the tail changes the result."""
    if found.khat_reason is not None:
        return f"no k̂ to judge the weights by: {found.khat_reason}"
    moved = abs(found.smoothed_delta - measured.delta)
    if measured.stderr is None or moved <= measured.stderr:
        return None
    return (
        f"smoothing the weights moves ΔH from {measured.delta:.3g} to {found.smoothed_delta:.3g}, by more "
        f"than its standard error {measured.stderr:.2g}"
    )
