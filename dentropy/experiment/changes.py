"""What is found at one η: prediction beside measurement, and the check by fresh rollouts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dentropy.estimators import Estimate, ImportanceDiagnostics, ImportanceResult
from dentropy.stats.tables import SequenceSums


@dataclass(frozen=True, eq=False, kw_only=True)
class Form:
    """Measurement and prediction that belong together: on these rollouts the slope is the measurement's derivative.

    In nats per token.

    Attributes:
        eta: The η.
        measured: ΔH by importance sampling, with prefix or with sequence weights.
        noise_floor: What the rounding in it stays below in 95% of cases.
        diagnostics: What the weights say about it, k̂ and verdict; below the noise floor always unusable.
        linear: The prediction η R', with the causal slope for prefix weights, with the exact one for sequence weights.
        quadratic: The prediction η R' + η² R''/2, R'' of the same form; None without R''.
        error: linear − measured, with the standard error of the pair.
    """

    eta: float
    measured: ImportanceResult
    noise_floor: float
    diagnostics: ImportanceDiagnostics
    linear: Estimate
    quadratic: Estimate | None
    error: Estimate

    @property
    def below_noise(self) -> bool:
        """Whether |measured| is below the arithmetic's own error, so that it is no measurement."""
        return self.eta != 0 and abs(self.measured.delta) < self.noise_floor


@dataclass(frozen=True, eq=False, kw_only=True)
class Change(Form):
    """The change of entropy at one η: predicted, measured, and how far to believe either.

    The attributes of `Form`, with prefix weights, and:

    Attributes:
        moved: The table there, with its tokens; its rows pair with those of the base table by `rollout`.
        sequence: The same with sequence weights.
    """

    moved: SequenceSums
    sequence: Form


@dataclass(frozen=True, eq=False)
class FreshCheck:
    """ΔH at one η from rollouts drawn anew from the moved policy, beside the importance-weighted measurement.

    Attributes:
        eta: Where it was checked.
        n_sequences: Fresh rollouts.
        n_tokens: Their tokens.
        value: Their entropy in nats per token, under the moved policy.
        delta: value − H̄, the fresh ΔH.
        stderr: The standard error of delta, clustered by prompt; None where the groups do not allow one.
        difference: delta − the measured ΔH of that η.
        difference_stderr: Its standard error: both use the same base rollouts, so it is not the sum of the two.
    """

    eta: float
    n_sequences: int
    n_tokens: int
    value: float
    delta: float
    stderr: float | None
    difference: float
    difference_stderr: float | None


def lost_in_rounding(diagnostics: ImportanceDiagnostics, delta: float, noise_floor: float) -> ImportanceDiagnostics:
    """Those of a measurement below its noise floor, which is none, whatever its weights say."""
    reason = f"|ΔH| is {abs(delta):.1e}, below the noise floor of the arithmetic, {noise_floor:.1e}"
    return replace(diagnostics, verdict="unusable", reason=reason)
