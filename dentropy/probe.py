"""The experiment: predict what an update does to the policy's entropy, measure it on the same rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dentropy import results
from dentropy.batch import PackedBatch
from dentropy.direction import Direction
from dentropy.estimators import (
    Estimate,
    ImportanceResult,
    OnPolicyAudit,
    clustered_stderr,
    importance,
    on_policy_audit,
    slope,
)
from dentropy.measure import measure
from dentropy.policy import Policy
from dentropy.summary import summary
from dentropy.tables import SequenceSums

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
class ProbeResult:
    """What `probe` found. Entropies are in nats per token, slopes in nats per token per unit of η.

    base           the table at the base weights, with tangent columns
    base_entropy   H̄, and base_stderr its standard error (None where the groups do not allow one)
    slopes         the slope by each of the three estimators: "causal", "exact", "mixed"
    etas           the η measured, in the order given
    moved          the table at each η; its rows pair with those of `base` by `rollout`
    measured       ΔH at each η
    audit          do the rollouts look like samples of this policy?
    batch          the rollouts
    step_size      the η that is the update itself
    prompts        "random" or "fixed": what the standard errors are for
    dtype, device  of the pass
    seeds, source  for the caller: random seeds by name; where policy, rollouts and update came from
    fresh          for the caller: the comparison with rollouts of the moved policy
    """

    base: SequenceSums
    base_entropy: float
    base_stderr: float | None
    slopes: dict[str, Estimate]
    etas: tuple[float, ...]
    moved: tuple[SequenceSums, ...]
    measured: tuple[ImportanceResult, ...]
    audit: OnPolicyAudit
    batch: PackedBatch
    step_size: float
    prompts: str
    dtype: str
    device: str
    seeds: dict[str, int] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    fresh: FreshCheck | None = None

    def save(self, out: str | Path) -> Path:
        """Write the run folder `out` (see `dentropy.results`): whole, or not at all.

        Raises ValueError where `out` exists and is not an empty folder.
        """
        return results.save(self, out)

    def summary(self) -> str:
        """The result as a table to read."""
        return summary(results.document(self))


def probe(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    etas: Sequence[float],
    *,
    token_budget: int = 4096,
    prompts: str = "random",
    progress: Callable[[int], None] | None = None,
) -> ProbeResult:
    """Slope of the entropy along `direction` by all three estimators, and measured ΔH(η) at each of `etas`.

    One pass with tangents at the base weights gives the slopes; one plain pass at θ + η·v per η gives the
    measurement (importance sampling on the same rollouts). `prompts` says what the standard errors are for:
    prompts drawn at "random", or this "fixed" set. `progress` is called with the number of tokens just
    finished; the whole is (1 + len(etas)) passes over the batch.

    Raises ValueError, before any work, for etas that are empty, not finite, repeated, or 0 only; see
    `measure` for what it refuses.

    Example:
        >>> from dentropy.demo.run import load_policy, draw_rollouts
        >>> from dentropy.policy_gradient import policy_gradient_direction
        >>> policy, tokenizer = load_policy()
        >>> rollouts = draw_rollouts(policy, tokenizer, n_prompts=8, per_prompt=2, seed=0)
        >>> update = draw_rollouts(policy, tokenizer, n_prompts=8, per_prompt=4, seed=1)
        >>> direction = policy_gradient_direction(policy, update, step_size=1e-4)
        >>> result = probe(policy, rollouts, direction, [1e-4])
        >>> bool(abs(result.measured[0].contributions.sum() - result.measured[0].delta) < 1e-12)
        True
    """
    etas = check_etas(etas)
    base = measure(policy, batch, direction, token_budget=token_budget, progress=progress)
    slopes = {name: slope(base, estimator=name, prompts=prompts) for name in ESTIMATORS}
    base_entropy, base_influence = entropy_per_token(base)

    moved, measured = [], []
    for eta in etas:
        sums = measure(
            policy, batch, direction, eta=eta, order=0, token_budget=token_budget, progress=progress
        )
        measured.append(importance(base, sums, prompts=prompts))
        moved.append(sums)
    return ProbeResult(
        base=base,
        base_entropy=base_entropy,
        base_stderr=clustered_stderr(base_influence, base.group, prompts)[0],
        slopes=slopes,
        etas=etas,
        moved=tuple(moved),
        measured=tuple(measured),
        audit=on_policy_audit(base),
        batch=batch,
        step_size=direction.step_size,
        prompts=prompts,
        dtype=str(policy.dtype).removeprefix("torch."),
        device=_device_name(policy.device),
    )


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
        raise ValueError(
            f"eta: {eta:g} was not measured; expected one of {', '.join(f'{e:g}' for e in result.etas)}"
        )
    if set(fresh.group.tolist()) != set(result.base.group.tolist()):
        raise ValueError(
            "fresh: its groups differ from those of the base rollouts; draw it from the same prompts"
        )
    measured = result.measured[result.etas.index(eta)]
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
