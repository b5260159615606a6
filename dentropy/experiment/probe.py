"""The experiment: predict what an update does to the policy's entropy, measure it on the same rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from dentropy.estimators import (
    Estimate,
    ImportanceDiagnostics,
    ImportanceResult,
    OnPolicyAudit,
    TrustRange,
    curvature,
    importance,
    importance_diagnostics,
    on_policy_audit,
    predict,
    prediction_error,
    slope,
    trust_range,
)
from dentropy.estimators.columns import entropy_ratio
from dentropy.estimators.groups import Groups
from dentropy.experiment import results
from dentropy.experiment.summary import summary
from dentropy.model.direction import Direction
from dentropy.model.policy import Policy
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.noise_floor import PASSES as NOISE_PASSES
from dentropy.passes.noise_floor import noise_floor
from dentropy.passes.parameter_attribution import parameter_attribution
from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.sampling import end_tokens, without_end
from dentropy.stats.tables import SequenceSums

ESTIMATORS = ("causal", "exact", "mixed")


@dataclass(frozen=True, eq=False)
class FreshCheck:
    """ΔH at one η from rollouts drawn anew from the moved policy, beside the importance-weighted measurement.

    eta                where it was checked
    n_sequences        fresh rollouts
    n_tokens           their tokens
    value              their entropy in nats per token, under the moved policy
    delta, stderr      value − H̄, the fresh ΔH, and its standard error, clustered by prompt
    difference         delta − the measured ΔH of that η
    difference_stderr  its standard error: both use the same base rollouts, so it is not the sum of the two
    """

    eta: float
    n_sequences: int
    n_tokens: int
    value: float
    delta: float
    stderr: float | None
    difference: float
    difference_stderr: float | None


@dataclass(frozen=True, eq=False)
class Change:
    """The change of entropy at one η: predicted, measured, and how far to believe either. In nats per token.

    eta                the η
    moved              the table there; its rows pair with those of the base table by `rollout`
    measured           ΔH by importance sampling
    diagnostics        what the weights say about it: k̂, verdict
    linear, quadratic  the predictions η R' and η R' + η² R''/2, with the causal slope; quadratic is None without R''
    error              linear − measured, with the standard error of the pair
    below_noise        whether |measured| is below the arithmetic's own error, so that it is no measurement
    """

    eta: float
    moved: SequenceSums
    measured: ImportanceResult
    diagnostics: ImportanceDiagnostics
    linear: Estimate
    quadratic: Estimate | None
    error: Estimate
    below_noise: bool


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What `probe` found. Entropies are in nats per token, slopes in nats per token per unit of η.

    base           the table at the base weights, with tangent columns and kept tokens
    base_entropy   H̄, and base_stderr its standard error (None where the groups do not allow one)
    slopes         the slope by each of the three estimators: "causal", "exact", "mixed"
    curvature      R'', and trust how far predictions reach; both None for weights in half precision
    changes        prediction and measurement at each η, in the order given
    noise_floor    two standard deviations of the rounding in a measured ΔH
    parameters     contribution of every parameter that moves to the causal slope, by name; None if not asked for
    audit          do the rollouts look like samples of this policy?
    without_end    rollouts that do not end with an end token of the policy; None where it has none
    batch          the rollouts
    step_size      the η that is the update itself
    prompts        "random" or "fixed": what the standard errors are for
    dtype, device  of the pass
    seeds, source, fresh   free for the caller: random seeds by name, where policy and rollouts came from, a FreshCheck
    """

    base: SequenceSums
    base_entropy: float
    base_stderr: float | None
    slopes: dict[str, Estimate]
    curvature: Estimate | None
    trust: TrustRange | None
    changes: tuple[Change, ...]
    noise_floor: float
    parameters: dict[str, float] | None
    audit: OnPolicyAudit
    without_end: int | None
    batch: PackedBatch
    step_size: float
    prompts: str
    dtype: str
    device: str
    seeds: dict[str, int] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    fresh: FreshCheck | None = None

    @property
    def etas(self) -> tuple[float, ...]:
        return tuple(change.eta for change in self.changes)

    def save(self, out: str | Path, tokenizer=None) -> Path:
        """Write the run folder `out` (see results.md beside this file): whole, or not at all.

        tokenizer: to show rollouts as text in report.html; without it they are token ids.
        Raises ValueError where `out` exists and is not an empty folder.
        """
        return results.save(self, out, tokenizer)

    def summary(self) -> str:
        """The result as a table to read."""
        return summary(results.document(self))


def probe(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    etas: Sequence[float],
    *,
    token_budget: int | str = AUTO,
    prompts: str = "random",
    parameters: bool = True,
    progress: Callable[[int], None] | None = None,
) -> ProbeResult:
    """Slope and curvature of the entropy along `direction`, and the measured ΔH(η) at each of `etas`.

    Passes with tangents at the base weights give slope and curvature; a plain pass at θ + η·v per η gives the
    measurement (importance sampling on the same rollouts); four more give the noise floor of the arithmetic; one
    reverse pass gives each parameter's share, unless `parameters` is False (it needs a gradient's memory). `prompts`
    says what the standard errors are for: prompts drawn at "random", or this "fixed" set. `token_budget` is that of
    `measure`, for every pass by itself: they differ in what a token needs. `progress` is called with the number of
    tokens just finished, `n_passes` times those of the batch in all.

    Raises ValueError, before any work, for etas that are empty, not finite, repeated, or 0 only; see `measure` for
    what it refuses.

    Example:
        >>> from dentropy.demo.run import load_policy, draw_rollouts
        >>> from dentropy.passes.policy_gradient import policy_gradient_direction
        >>> policy, tokenizer = load_policy()
        >>> rollouts = draw_rollouts(policy, tokenizer, n_prompts=8, per_prompt=2, seed=0)
        >>> update = draw_rollouts(policy, tokenizer, n_prompts=8, per_prompt=4, seed=1)
        >>> direction = policy_gradient_direction(policy, update, step_size=1e-4)
        >>> result = probe(policy, rollouts, direction, [1e-4])
        >>> measured = result.changes[0].measured
        >>> bool(abs(measured.contributions.sum() - measured.delta) < 1e-12)
        True
    """
    etas = check_etas(etas)
    settings = {"token_budget": token_budget, "progress": progress}
    base = measure(policy, batch, direction, order=_order(policy), keep_tokens=True, **settings)
    slopes = {name: slope(base, estimator=name, prompts=prompts) for name in ESTIMATORS}
    second = None if base.d2logp is None else curvature(base, prompts=prompts, first=slopes["exact"])
    floor = noise_floor(policy, batch, direction, base, exact=slopes["exact"], **settings)
    changes = []
    for eta in etas:
        moved = measure(policy, batch, direction, eta=eta, order=0, **settings)
        changes.append(change(base, moved, eta, slopes["causal"], second, floor))
    shares = parameter_attribution(policy, batch, direction, base, **settings) if parameters else None
    base_entropy, base_influence = entropy_per_token(base)
    return ProbeResult(
        base=base,
        base_entropy=base_entropy,
        base_stderr=slopes["causal"].groups.stderr(base_influence)[0],
        slopes=slopes,
        curvature=second,
        trust=None if second is None else trust_range(slopes["causal"], second),
        changes=tuple(changes),
        noise_floor=floor,
        parameters=shares,
        audit=on_policy_audit(base),
        without_end=without_end(batch, end_tokens(policy)),
        batch=batch,
        step_size=direction.step_size,
        prompts=prompts,
        dtype=str(policy.dtype).removeprefix("torch."),
        device=_device_name(policy.device),
    )


def n_passes(policy: Policy, etas: Sequence[float], parameters: bool = True) -> int:
    """How many times `probe` goes through the batch."""
    at_base = 3 if _order(policy) == 2 else 1
    return at_base + NOISE_PASSES + len(etas) + parameters


def change(
    base: SequenceSums, moved: SequenceSums, eta: float, first: Estimate, second: Estimate | None, noise_floor: float
) -> Change:
    """Prediction from slope and curvature against the measurement at one η."""
    measured, linear = importance(base, moved, prompts=first.prompts), predict(first, eta)
    diagnostics, below_noise = importance_diagnostics(measured), eta != 0 and abs(measured.delta) < noise_floor
    if below_noise:
        reason = f"|ΔH| is {abs(measured.delta):.1e}, below the noise floor of the arithmetic, {noise_floor:.1e}"
        diagnostics = replace(diagnostics, verdict="unusable", reason=reason)
    return Change(
        eta=eta,
        moved=moved,
        measured=measured,
        diagnostics=diagnostics,
        linear=linear,
        quadratic=None if second is None else predict(first, eta, second),
        error=prediction_error(linear, measured),
        below_noise=below_noise,
    )


def _order(policy: Policy) -> int:
    """Second order by differences needs weights in which a small step does not vanish."""
    return 2 if torch.finfo(policy.dtype).bits >= 32 else 1


def entropy_per_token(sums: SequenceSums) -> tuple[float, np.ndarray]:
    """H̄ = Σ H_i / Σ T_i in nats per token, and its influence values (H_i − H̄ T_i) / Σ T_i, float64 [S]."""
    ratio = entropy_ratio(sums, "token")
    return float(ratio.mean), ratio.centred / ratio.total


def fresh_check(result: ProbeResult, eta: float, fresh: SequenceSums) -> FreshCheck:
    """Compare the measurement at `eta` with rollouts `fresh`, drawn from the moved policy and scored by it.

    `fresh` must answer the same prompts under the same group numbers as the base rollouts: the standard
    errors pair the two by prompt. Raises ValueError where the groups differ or `eta` was not measured.

    With ψ the influence values of the fresh and the base entropy and of the measured ΔH, the two standard
    errors are those of ψ_fresh − ψ_base and ψ_fresh − ψ_base − ψ_ΔH, clustered by prompt.
    """
    if eta not in result.etas:
        raise ValueError(f"eta: {eta:g} was not measured; expected one of {', '.join(f'{e:g}' for e in result.etas)}")
    if set(fresh.group.tolist()) != set(result.base.group.tolist()):
        raise ValueError("fresh: its groups differ from those of the base rollouts; draw it from the same prompts")
    measured = result.changes[result.etas.index(eta)].measured
    value, influence = entropy_per_token(fresh)
    _, base_influence = entropy_per_token(result.base)
    groups = Groups.of_two(fresh.group, result.base.group, result.prompts)
    paired = np.concatenate([influence, -base_influence])
    against = np.concatenate([influence, -base_influence - measured.influence])
    delta = value - result.base_entropy
    return FreshCheck(
        eta=eta,
        n_sequences=len(fresh),
        n_tokens=int(fresh.n_tokens.sum()),
        value=value,
        delta=delta,
        stderr=groups.stderr(paired)[0],
        difference=delta - measured.delta,
        difference_stderr=groups.stderr(against)[0],
    )


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def check_etas(etas: Sequence[float]) -> tuple[float, ...]:
    """`etas` as floats; ValueError where they are empty, not finite, repeated, or 0 only."""
    checked = tuple(float(eta) for eta in etas)
    if not checked:
        raise ValueError("etas: expected at least one, got none")
    for eta in checked:
        if not math.isfinite(eta):
            raise ValueError(f"etas: expected finite numbers, got {eta}")
        if checked.count(eta) > 1:
            raise ValueError(f"etas: {eta:g} is given {checked.count(eta)} times, expected each once")
    if not any(checked):
        raise ValueError("etas: η = 0 only, where nothing changes; expected at least one other")
    return checked
