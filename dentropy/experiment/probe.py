"""The experiment: predict what an update does to the policy's entropy, measure it on the same rollouts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import torch

from dentropy.estimators import (
    Estimate,
    Forecast,
    ImportanceResult,
    MeanChange,
    curvature,
    forecast,
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
from dentropy.estimators.importance_sampling import paired_rows
from dentropy.estimators.pass_at_k import check_pass_at_k
from dentropy.estimators.prefix_weights import reach
from dentropy.estimators.reweighting import FORM, LARGEST_LOG_WEIGHT
from dentropy.experiment.changes import Change, Form, FreshCheck, lost_in_rounding
from dentropy.experiment.cost import cost
from dentropy.experiment.proxies import grades
from dentropy.experiment.results import ProbeResult
from dentropy.experiment.update_groups import check_groups, grouped, tokens_run
from dentropy.model.direction import Direction
from dentropy.model.fingerprint import unchanged
from dentropy.model.policy import Policy
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.noise_floor import DERIVATIVE, noise_floors
from dentropy.passes.parameter_attribution import moving_by_name, parameter_shares
from dentropy.passes.policy_gradient import PolicyGradientStep
from dentropy.passes.second_order import bend, difference_step, doubt, with_second_order
from dentropy.passes.slope_gradient import slope_gradient
from dentropy.passes.update_attribution import PARTS, UpdateAttribution, update_attribution
from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.sampling import end_tokens, without_end
from dentropy.stats.checks import NotFiniteError
from dentropy.stats.sequence_sums import sequence_sums
from dentropy.stats.tables import SequenceSums

ON_NONFINITE = ("raise", "drop")
ESTIMATORS = ("causal", "exact", "mixed")
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of |η|
# Over √rollouts, as standard errors fall: the bend within ±η up to which the measurements there serve the curvature.
# Its error was then some hundredths of its standard error, on random models and on the demo's.
BEND = 0.25


def probe(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    etas: Sequence[float],
    *,
    token_budget: int | str = AUTO,
    prompts: str = "random",
    parameters: bool = True,
    pass_at_k: Sequence[int] = (),
    update: PolicyGradientStep | None = None,
    groups: Sequence[str] = (),
    on_nonfinite: str = "raise",
    progress: Callable[[int], None] | None = None,
) -> ProbeResult:
    """Slope and curvature of the entropy along `direction`, and the measured ΔH(η) at each of `etas`.

    A pass with tangents at the base weights gives the slope; a plain pass at θ + η·v per η gives the measurement
    (importance sampling on the same rollouts, with prefix weights and beside it with sequence weights: see "Which form"
    in mathematics.md) and one over a sixth of the rollouts, 16 at least, the noise floors of all; one reverse pass
    gives each parameter's share, unless `parameters` is False (it needs a gradient's memory). With `update`, the step
    that `direction` is or is to be explained by, the same reverse pass and one with tangents over its rollouts give the
    share of each of their tokens, one over some of them (`noise_rollouts`) the noise in these, and a plain one over
    some the grades of published proxies. `groups` names groups of these tokens (`token_groups`) whose share is to have
    an error bar, each for the passes that `update_groups` says. Second derivatives, for the curvature, are second
    differences of values: of those at ±η where two of the `etas` are such a pair and a good step for it, else of two
    plain passes more.

    `prompts` says what the standard errors are for: prompts drawn at "random", or this "fixed" set. `pass_at_k` are the
    k whose pass@k the forecast has too. `token_budget` is that of `measure`, for every pass by itself: they differ in
    what a token needs. `on_nonfinite` says what becomes of rollouts whose statistics are not finite: "raise", or "drop"
    them, which the result counts, and run the passes again without them. `progress` is called with the number of tokens
    just finished, `tokens_to_run` in all: what turns out not to be needed counts as finished.

    In a process group every rank calls it, as `measure`.

    Raises ValueError, before any work, for etas that are empty, not finite, repeated, or 0 only, for groups of no such
    name or without `update`, and for `pass_at_k` that the rewards or the groups do not allow (see `forecast`); see
    `measure` for what it refuses.
    ValueError too where the policy's weights have changed by the end.

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
    date, begun = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    etas = check_etas(etas)
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite: {on_nonfinite!r}, expected one of {ON_NONFINITE}")
    groups = check_groups(groups, policy, update)
    settings = {"token_budget": token_budget, "progress": progress}
    given, used = batch, np.arange(len(batch))
    with unchanged(policy.model):
        while True:
            check_pass_at_k(pass_at_k, batch.reward, Groups.of(batch.group, prompts), batch.sampler_logp)
            try:
                base, moved, own_steps, no_curvature = _tables(policy, batch, direction, etas, **settings)
                break
            except NotFiniteError as error:
                used = np.delete(used, error.rollouts)
                if on_nonfinite == "raise" or not given.response_lens[used].any():
                    raise
                batch = given.take(used)
        slopes = {name: slope(base, estimator=name, prompts=prompts) for name in ESTIMATORS}
        seconds = dict.fromkeys(DERIVATIVE.values())
        if no_curvature is None:
            seconds = {name: curvature(base, estimator=name, prompts=prompts, first=slopes[name]) for name in seconds}
        first, second = ([found[name] for name in DERIVATIVE.values()] for found in (slopes, seconds))
        measured = {
            eta: [importance(base, table, weights=weights, prompts=prompts) for weights in DERIVATIVE]
            for eta, table in moved.items()
        }
        floors = noise_floors(policy, batch, direction, base, moved, measured, first, **settings)
        changes = []
        for eta in etas:
            of_forms = zip(measured[eta], floors[eta], first, second, strict=True)
            prefix, sequence = (_form(eta, *of_form) for of_form in of_forms)
            changes.append(Change(**vars(prefix), moved=moved[eta], sequence=sequence))
        shares, of_update = _explained(policy, batch, direction, base, parameters, update, **settings)
        kinds, graded = {}, {}
        if update is not None:
            named = {"direction": direction, "prompts": prompts}
            kinds = grouped(policy, batch, update, base, of_update, groups, **named, **settings)
            graded = grades(update, of_update, **settings)
    base_entropy, base_influence = entropy_per_token(base)
    rollouts = None if update is None else update.batch
    return ProbeResult(
        base=base,
        base_entropy=base_entropy,
        base_stderr=slopes["causal"].groups.stderr(base_influence)[0],
        slopes=slopes,
        curvature=seconds["causal"],
        exact_curvature=seconds["exact"],
        no_curvature=no_curvature,
        trust=None if seconds["causal"] is None else trust_range(slopes["causal"], seconds["causal"]),
        changes=tuple(changes),
        forecast=forecast_within_reach(base, changes, slopes["causal"], batch.reward, base_entropy, pass_at_k),
        parameters=shares,
        audit=on_policy_audit(base),
        without_end=without_end(batch, end_tokens(policy)),
        batch=batch,
        dropped=tuple(np.setdiff1d(np.arange(len(given)), used).tolist()),
        step_size=direction.step_size,
        prompts=prompts,
        dtype=str(policy.dtype).removeprefix("torch."),
        device=_device_name(policy.device),
        cost=cost(batch, len(etas), own_steps, parameters, rollouts, tokens_run(kinds, update, batch)),
        update=of_update,
        groups=kinds,
        proxies=graded,
        date=date,
        seconds=time.perf_counter() - begun,
    )


def _tables(
    policy: Policy, batch: PackedBatch, direction: Direction, etas: Sequence[float], **settings
) -> tuple[SequenceSums, dict[float, SequenceSums], int, str | None]:
    """The table at the base weights, those at each of `etas`, and of `_with_second_order` the rest."""
    base = measure(policy, batch, direction, keep_tokens=True, **settings)
    moved = {eta: measure(policy, batch, direction, eta=eta, order=0, keep_tokens=True, **settings) for eta in etas}
    if not _has_second_order(policy):
        return base, moved, 0, f"weights in {policy.dtype}, in which a small step vanishes"
    base, own_steps, no_curvature = _with_second_order(policy, batch, direction, base, moved, **settings)
    return base, moved, own_steps, no_curvature


def _explained(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    base: SequenceSums,
    parameters: bool,
    update: PolicyGradientStep | None,
    **settings,
) -> tuple[dict[str, float] | None, UpdateAttribution | None]:
    """The shares of parameters and of the update's tokens, None for what was not asked for, from one reverse pass."""
    if not parameters and update is None:
        return None, None
    moving = moving_by_name(policy, direction)
    names = list(dict.fromkeys([*moving, *([] if update is None else update.gradient)]))
    gradient = slope_gradient(policy, batch, base, names, parts=1 if update is None else PARTS, **settings)
    shares = parameter_shares(moving, gradient) if parameters else None
    if update is None:
        return shares, None
    more = {"direction": direction, "gradient": gradient}
    return shares, update_attribution(policy, batch, update, base, **more, **settings)


def tokens_to_run(
    policy: Policy,
    batch: PackedBatch,
    etas: Sequence[float],
    parameters: bool = True,
    update: PolicyGradientStep | None = None,
    groups: Sequence[str] = (),
) -> int:
    """How many response tokens `probe` reports as finished: all that it may have to run."""
    rollouts = None if update is None else update.batch
    of_groups = 0 if update is None else len(set(groups)) * (update.batch.n_tokens + batch.n_tokens)
    return cost(batch, len(etas), 2 if _has_second_order(policy) else 0, parameters, rollouts, of_groups)["tokens"]


def _with_second_order(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    base: SequenceSums,
    moved: dict[float, SequenceSums],
    *,
    progress: Callable[[int], None] | None,
    **settings,
) -> tuple[SequenceSums, int, str | None]:
    """`base` with second derivatives, how many passes that took, and why they are none, or None where they are.

    The smallest pair ±η of `moved` serves that is no smaller than the step `measure` would take, for rounding, and
    within which values bend so little that the error of the curvature is a small part of its standard error.
    """
    step = own = difference_step(base.tokens, policy.dtype)
    pair = min((eta for eta in moved if eta >= own and -eta in moved), default=None)
    sides = None if pair is None else (moved[pair].tokens, moved[-pair].tokens)
    if sides is not None and bend(base.tokens, *sides, pair) <= BEND / len(base) ** 0.5:
        step, passes = pair, 0
        if progress is not None:
            progress(2 * batch.n_tokens)
    else:
        settings |= dict(order=0, keep_tokens=True, progress=progress)
        sides, passes = [measure(policy, batch, direction, eta=eta, **settings).tokens for eta in (own, -own)], 2
    reason = doubt(base.tokens, *sides, step)
    if reason is not None:
        return base, passes, reason
    tokens = with_second_order(base.tokens, *sides, step)
    sums = sequence_sums(tokens, batch.response_offsets, group=batch.group)
    sampler = {name: getattr(base, name) for name in ("sampler_logp", "sampler_tokens")}
    sums = replace(sums, tokens=tokens, second_order_step=np.full(len(sums), step), **sampler)
    return sums, passes, None


def forecast_within_reach(
    base: SequenceSums,
    changes: Sequence[Change],
    first: Estimate,
    reward: np.ndarray | None,
    base_entropy: float,
    pass_at_k: Sequence[int],
) -> Forecast:
    """What the step buys and costs, at every η that is not too far away to be measured.

    Of `changes` only `eta`, `moved` and `measured` are read.
    """
    near = {
        change.eta: change
        for change in changes
        if reach(base, change.moved, paired_rows(base, change.moved)) <= LARGEST_LOG_WEIGHT
    }
    measured = {eta: change.measured for eta, change in near.items()}
    return forecast(
        base,
        {eta: change.moved for eta, change in near.items()},
        None if reward is None else reward[base.rollout],
        pass_at_k=pass_at_k,
        entropy=MeanChange(base=base_entropy, slope=first, changes=measured),
        prompts=first.prompts,
    )


def _form(eta: float, measured: ImportanceResult, noise_floor: float, first: Estimate, second: Estimate | None) -> Form:
    """Prediction from slope and curvature against the measurement at one η."""
    linear = predict(first, eta)
    found = Form(
        eta=eta,
        measured=measured,
        noise_floor=noise_floor,
        diagnostics=importance_diagnostics(measured),
        linear=linear,
        quadratic=None if second is None else predict(first, eta, second),
        error=prediction_error(linear, measured),
    )
    if not found.below_noise:
        return found
    return replace(found, diagnostics=lost_in_rounding(found.diagnostics, found.measured.delta, noise_floor))


def _has_second_order(policy: Policy) -> bool:
    """Differences need weights in which a small step does not vanish."""
    return torch.finfo(policy.dtype).bits >= 32


def entropy_per_token(sums: SequenceSums) -> tuple[float, np.ndarray]:
    """H̄ = Σ H_i / Σ T_i in nats per token, and its influence values (H_i − H̄ T_i) / Σ T_i, float64 [S]."""
    ratio = entropy_ratio(sums, "token", FORM["causal"])
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
