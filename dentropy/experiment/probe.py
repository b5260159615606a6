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
    clustered_stderr,
    curvature,
    importance,
    importance_diagnostics,
    on_policy_audit,
    predict,
    prediction_error,
    slope,
    trust_range,
)
from dentropy.experiment import results
from dentropy.experiment.summary import summary
from dentropy.model.direction import Direction
from dentropy.model.policy import Policy
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.noise_floor import noise_floor, sampled_rollouts
from dentropy.passes.parameter_attribution import parameter_attribution
from dentropy.rollouts.batch import PackedBatch
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
    noise_floor        what the rounding in `measured` stays below in 95% of cases
    below_noise        whether |measured| is below it, so that it is no measurement
    """

    eta: float
    moved: SequenceSums
    measured: ImportanceResult
    diagnostics: ImportanceDiagnostics
    linear: Estimate
    quadratic: Estimate | None
    error: Estimate
    noise_floor: float

    @property
    def below_noise(self) -> bool:
        return self.eta != 0 and abs(self.measured.delta) < self.noise_floor


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What `probe` found. Entropies are in nats per token, slopes in nats per token per unit of η.

    base           the table at the base weights, with tangent columns and kept tokens
    base_entropy   H̄, and base_stderr its standard error (None where the groups do not allow one)
    slopes         the slope by each of the three estimators: "causal", "exact", "mixed"
    curvature      R'', and trust how far predictions reach; both None for weights in half precision
    changes        prediction and measurement at each η, in the order given
    parameters     contribution of every parameter that moves to the causal slope, by name; None if not asked for
    audit          do the rollouts look like samples of this policy?
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
    parameters: dict[str, float] | None
    audit: OnPolicyAudit
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

    @property
    def noise_floor(self) -> float:
        """The largest of the changes', in nats per token."""
        return max(change.noise_floor for change in self.changes)

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
    measurement (importance sampling on the same rollouts) and one over a fifth of the rollouts its noise floor; one
    reverse pass gives each parameter's share, unless `parameters` is False (it needs a gradient's memory). `prompts`
    says what the standard errors are for: prompts drawn at "random", or this "fixed" set. `token_budget` is that of
    `measure`, for every pass by itself: they differ in what a token needs. `progress` is called with the number of
    tokens just finished, `tokens_to_run` in all.

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
    second = None if base.d2logp is None else curvature(base, prompts=prompts)
    changes = []
    for eta in etas:
        moved = measure(policy, batch, direction, eta=eta, order=0, **settings)
        floor = noise_floor(policy, batch, direction, base, moved, eta, **settings)
        changes.append(change(base, moved, eta, prompts, floor))
    shares = parameter_attribution(policy, batch, direction, base, **settings) if parameters else None
    base_entropy, base_influence = entropy_per_token(base)
    return ProbeResult(
        base=base,
        base_entropy=base_entropy,
        base_stderr=clustered_stderr(base_influence, base.group, prompts)[0],
        slopes=slopes,
        curvature=second,
        trust=None if second is None else trust_range(slopes["causal"], second),
        changes=tuple(changes),
        parameters=shares,
        audit=on_policy_audit(base),
        batch=batch,
        step_size=direction.step_size,
        prompts=prompts,
        dtype=str(policy.dtype).removeprefix("torch."),
        device=_device_name(policy.device),
    )


def tokens_to_run(policy: Policy, batch: PackedBatch, etas: Sequence[float], parameters: bool = True) -> int:
    """How many response tokens `probe` runs through the policy, over all its passes."""
    passes = (3 if _order(policy) == 2 else 1) + len(etas) + parameters
    return passes * batch.n_tokens + len(etas) * int(batch.response_lens[sampled_rollouts(batch)].sum())


def change(base: SequenceSums, moved: SequenceSums, eta: float, prompts: str, noise_floor: float) -> Change:
    """Prediction against measurement at one η, from the two tables."""
    measured = importance(base, moved, prompts=prompts)
    found = Change(
        eta=eta,
        moved=moved,
        measured=measured,
        diagnostics=importance_diagnostics(measured),
        linear=predict(base, eta, prompts=prompts),
        quadratic=None if base.d2logp is None else predict(base, eta, order=2, prompts=prompts),
        error=prediction_error(base, moved, eta, prompts=prompts),
        noise_floor=noise_floor,
    )
    if not found.below_noise:
        return found
    reason = f"|ΔH| is {abs(measured.delta):.1e}, below the noise floor of the arithmetic, {noise_floor:.1e}"
    return replace(found, diagnostics=replace(found.diagnostics, verdict="unusable", reason=reason))


def _order(policy: Policy) -> int:
    """Second order by differences needs weights in which a small step does not vanish."""
    return 2 if torch.finfo(policy.dtype).bits >= 32 else 1


def entropy_per_token(sums: SequenceSums) -> tuple[float, np.ndarray]:
    """H̄ = Σ H_i / Σ T_i in nats per token, and its influence values (H_i − H̄ T_i) / Σ T_i, float64 [S]."""
    n_tokens = sums.n_tokens.sum()
    value = sums.entropy.sum() / n_tokens
    return float(value), (sums.entropy - value * sums.n_tokens) / n_tokens


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
    # With prompts fixed, a prompt's fresh and base answers are two samples, each with a mean of its own.
    apart = fresh.group.max() - result.base.group.min() + 1 if result.prompts == "fixed" else 0
    group = np.concatenate([fresh.group, result.base.group + apart])
    paired = np.concatenate([influence, -base_influence])
    against = np.concatenate([influence, -base_influence - measured.influence])
    delta = value - result.base_entropy
    return FreshCheck(
        eta=eta,
        n_sequences=len(fresh),
        n_tokens=int(fresh.n_tokens.sum()),
        value=value,
        delta=delta,
        stderr=clustered_stderr(paired, group, result.prompts)[0],
        difference=delta - measured.delta,
        difference_stderr=clustered_stderr(against, group, result.prompts)[0],
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
