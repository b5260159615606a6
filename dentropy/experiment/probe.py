"""The experiment: predict what an update does to the policy's entropy, measure it on the same rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from dentropy.estimators import (
    Estimate,
    ImportanceResult,
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
from dentropy.experiment.changes import Change, FreshCheck
from dentropy.experiment.results import ProbeResult
from dentropy.model.direction import Direction
from dentropy.model.policy import Policy
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.noise_floor import noise_floor, sampled_rollouts
from dentropy.passes.parameter_attribution import parameter_attribution
from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.sampling import end_tokens, without_end
from dentropy.stats.tables import SequenceSums

ESTIMATORS = ("causal", "exact", "mixed")
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of |η|


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
    second = None if base.d2logp is None else curvature(base, prompts=prompts, first=slopes["exact"])
    changes = []
    for eta in etas:
        moved = measure(policy, batch, direction, eta=eta, order=0, **settings)
        measured = importance(base, moved, prompts=prompts)
        floor = noise_floor(policy, batch, direction, base, measured, slopes["exact"], eta, **settings)
        changes.append(change(moved, measured, eta, slopes["causal"], second, floor))
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
        parameters=shares,
        audit=on_policy_audit(base),
        without_end=without_end(batch, end_tokens(policy)),
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


def change(
    moved: SequenceSums,
    measured: ImportanceResult,
    eta: float,
    first: Estimate,
    second: Estimate | None,
    noise_floor: float,
) -> Change:
    """Prediction from slope and curvature against the measurement at one η."""
    linear = predict(first, eta)
    found = Change(
        eta=eta,
        moved=moved,
        measured=measured,
        diagnostics=importance_diagnostics(measured),
        linear=linear,
        quadratic=None if second is None else predict(first, eta, second),
        error=prediction_error(linear, measured),
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
    """`etas` as floats; ValueError where they are empty, beyond float32, repeated, or 0 only."""
    checked = tuple(float(eta) for eta in etas)
    if not checked:
        raise ValueError("etas: expected at least one, got none")
    for eta in checked:
        if not math.isfinite(eta):
            raise ValueError(f"etas: expected finite numbers, got {eta}")
        if eta and not SMALLEST <= abs(eta) <= LARGEST:
            raise ValueError(f"etas: {eta:g}, expected a size from {SMALLEST:.0e} to {LARGEST:.0e}, as float32 has")
        if checked.count(eta) > 1:
            raise ValueError(f"etas: {eta:g} is given {checked.count(eta)} times, expected each once")
    if not any(checked):
        raise ValueError("etas: η = 0 only, where nothing changes; expected at least one other")
    return checked
