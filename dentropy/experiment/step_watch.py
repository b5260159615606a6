"""One optimizer step of a training loop: what it will do to the entropy, and what it did.

Before the step the direction that the optimizer is about to take is foreseen by a copy of it, and slope and curvature
along it are taken on rollouts that did not make it. After the step the same rollouts measure the change. Rollouts of
the policy after the step, the next ones of an on-policy trainer, can measure it backwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from dentropy.estimators import (
    Statistic,
    curvature,
    importance,
    importance_diagnostics,
    predict,
    prediction_error,
    slope,
)
from dentropy.estimators.columns import entropy_ratio
from dentropy.estimators.reweighting import FORM
from dentropy.experiment.changes import lost_in_rounding
from dentropy.experiment.probe import forecast_within_reach, probe
from dentropy.experiment.readings import told_apart
from dentropy.experiment.results import ProbeResult
from dentropy.experiment.watched_policy import WatchedPolicy
from dentropy.model.direction import Direction
from dentropy.model.optimizer_step import own_parameters, stepped_copies
from dentropy.model.policy import Policy
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.noise_floor import noise_floor
from dentropy.rollouts.batch import PackedBatch
from dentropy.shown import count, html_table, lines, number

VERDICTS = {"unusable": 0, "strained": 1, "reliable": 2}


@contextmanager
def watch_step(
    model: nn.Module | Policy, optimizer: torch.optim.Optimizer, batch: PackedBatch, *, token_budget: int | str = AUTO
) -> Iterator[StepWatch]:
    """Watches the optimizer step that is taken inside: `with watch_step(model, optimizer, batch) as step: ...`.

    On entry the change of entropy is predicted, at the end of the block it is measured. Weights, gradients, optimizer
    state, random states, buffers, training mode and attention setting are those of the same loop without it, bit for
    bit. Half-precision weights are measured on float32 copies, and a warning says what these need. In a process group
    every rank calls it, as `measure`, with the same weights, gradients and rollouts; a model in DistributedDataParallel
    as its `module`.

    Args:
        model: the policy in training, or a Policy of it, which spares a self-check at every step.
        optimizer: built on its parameters, gradients ready: clipped, unscaled.
        batch: rollouts of the policy as it is now. Not those that made the gradients: judged on its own rollouts an
            update is biased, often to the wrong sign.
        token_budget: as in `measure`.

    Yields:
        StepWatch: `predicted` at once, `measured` and `realized_fraction` after the block.

    Raises:
        ValueError: where the optimizer has no gradients or its step cannot be foreseen, and as `Policy` and `measure`
            do: of several processes where their weights, steps or rollouts are not the same.

    Example:
        >>> from dentropy.demo.run import draw_rollouts, load_policy
        >>> policy, tokenizer = load_policy()
        >>> optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-4)
        >>> ids = torch.tensor([tokenizer.encode("17=9+8")])
        >>> _ = policy.model(input_ids=ids, labels=ids).loss.backward()
        >>> batch = draw_rollouts(policy, tokenizer, n_prompts=16, per_prompt=2, seed=0)
        >>> with watch_step(policy, optimizer, batch) as step:
        ...     optimizer.step()
        >>> step.quadratic_error.value == step.predicted.value - step.measured.delta, step.realized_fraction
        (True, 1.0)
    """
    step = StepWatch(WatchedPolicy(model, optimizer), optimizer, batch, token_budget=token_budget)
    yield step
    step.look_back()


@dataclass(frozen=True)
class OtherChange:
    """The change of entropy of a step by other rollouts than its own: R(after) − R(before), nats per token.

    delta, stderr      the change and its standard error; None where the groups do not allow one
    ess_fraction       of the weights from the new weights, or from the sampler, to the old
    verdict            as `importance_diagnostics` gives it
    """

    delta: float
    stderr: float | None
    ess_fraction: float
    verdict: str


class StepWatch:
    """What is known of one step. Entropies are in nats per token, slopes per unit of η, the largest learning rate.

    Attributes:
        batch: the rollouts.
        base: their table before the step, with tangent columns along the step and kept tokens.
        direction: the step as it will be stored, in the weights' own dtype; None where it moves nothing (a learning
            rate of 0, gradients of 0, or all of it rounded away).
        slope, curvature: along it, the causal forms; None without a direction, and the curvature where passes run in
            half precision.
        slope_intended: the causal slope along the step as it is meant, taken on float32 copies of weights, gradients
            and state; None where that moves nothing.
        predicted: the change of entropy foreseen, Estimate; None without a direction: none.
        moved: the table after the step; this and what follows are None until `look_back`.
        measured: ImportanceResult, on the same rollouts, with prefix weights, whose derivative `slope` is.
        forecast: Forecast of length, KL and, where `batch` has them, rewards; None without a direction.
        diagnostics: of its weights; the verdict is "unusable" below the noise floor.
        noise_floor: what rounding in `measured` stays below in 95% of cases; None without a direction.
        error: η·slope less measured, with the standard error of the pair; None without a direction.
        quadratic_error: predicted less measured, so with the curvature's term; None without a curvature.
        realized_fraction: ⟨stored change, intended change⟩ / ‖intended‖²: how much of the step that was meant is in
            the weights after it; None where nothing was meant.
    """

    def __init__(
        self,
        watched: WatchedPolicy,
        optimizer: torch.optim.Optimizer,
        batch: PackedBatch,
        *,
        token_budget: int | str = AUTO,
    ):
        self._watched, self._settings = watched, {"token_budget": token_budget}
        self.batch = batch
        self._parameters = own_parameters(watched.model, optimizer)
        self._before = {id(p): p.detach().clone() for p in self._parameters.values()}
        stored, self._intended = self._foreseen(optimizer)
        step_size = max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
        self.direction = _direction(stored, step_size)
        self.slope = self.curvature = self.slope_intended = self.predicted = None
        self.moved = self.measured = self.diagnostics = self.noise_floor = self.forecast = None
        self.error = self.quadratic_error = self.realized_fraction = None
        with watched.policy() as policy:
            self._predict(policy, stored, step_size)

    def __repr__(self) -> str:
        """What is known by now."""
        return lines(self, self._shown())

    def _repr_html_(self) -> str:
        """The same, for a notebook."""
        return html_table("One optimizer step", ("", "value ± SE"), self._shown())

    def _shown(self) -> list[tuple[str, str]]:
        unit, found, measured = "nats per token", self.predicted, self.measured
        rollouts = f"{count(len(self.base), 'rollout')} of {count(np.unique(self.base.group).size, 'prompt')}"
        rows = [("rollouts", rollouts), ("entropy", f"{self.entropy:.3e} {unit} before")]
        if found is None:
            rows.append(("predicted ΔH", "none: the step moves nothing"))
        else:
            rows.append(("slope", number(self.slope.value, self.slope.stderr, f"{unit} per unit of η")))
            rows.append(("predicted ΔH", number(found.value, found.stderr, unit)))
        if measured is None:
            return [*rows, ("measured ΔH", "not yet")]
        rows.append(("measured ΔH", f"{number(measured.value, measured.stderr, unit)}, {self.diagnostics.verdict}"))
        part = self.realized_fraction
        return rows if part is None else [*rows, ("realized", f"{part:.1%} of the step")]

    def report(self) -> ProbeResult | None:
        """The whole experiment on this step, attribution included; before the step is taken. None without a
        direction."""
        if self.direction is None:
            return None
        with self._watched.policy() as policy:
            return probe(policy, self.batch, self.direction, [self.direction.step_size], **self._settings)

    def look_back(self) -> None:
        """Measures the step that was taken since: fills `measured` and what goes with it."""
        with self._watched.policy() as policy:
            self.moved = measure(policy, self.batch, keep_tokens=True, **self._settings)
        self.measured = importance(self.base, self.moved, weights="prefix")
        self.diagnostics = importance_diagnostics(self.measured)
        self.realized_fraction = self._realized()
        if self.direction is None:
            return
        self.error = prediction_error(predict(self.slope, self.eta), self.measured)
        if self.curvature is not None:
            self.quadratic_error = prediction_error(self.predicted, self.measured)
        self.forecast = forecast_within_reach(self.base, [self], self.slope, self.batch.reward, self.entropy, ())
        self._hold_against_rounding()

    def look_back_by(self, batch: PackedBatch) -> OtherChange:
        """The change by rollouts of the policy as it is now, right after the step: its next ones, sampled for the next.

        They are weighted from the new weights to the old; those with `sampler_logp`, which another policy sampled, from
        that one to both. None of them may have made this step or one before it. Raises as `measure` and `importance`
        do.
        """
        with self._watched.policy() as policy:
            now = measure(policy, batch, keep_tokens=True, **self._settings)
        with self._watched.policy(self._before) as policy:
            past = measure(policy, batch, keep_tokens=True, **self._settings)
        back = importance(now, past, weights="prefix")  # R(before) − R(after)
        return OtherChange(-back.delta, back.stderr, back.ess_fraction, importance_diagnostics(back).verdict)

    def as_sampled(self) -> PackedBatch:
        """The rollouts with what the policy before the step gave their tokens: for a judge of later steps."""
        return replace(self.batch, sampler_logp=np.asarray(self.base.tokens.logp, dtype=np.float64))

    def numbers(self) -> dict[str, float]:
        """What there is to log, by name: numbers that are not there are left out, the verdict is 0 for unusable, 1 for
        strained and 2 for reliable; `slope_intended` is there where it is told apart from 0."""
        found: dict[str, float | None] = {"entropy": self.entropy, "predicted_delta": 0.0}
        if self.direction is not None:
            found |= _with_error("slope", self.slope) | _with_error("predicted_delta", self.predicted)
        meant = self.slope_intended
        if meant is not None and told_apart(meant.value, meant.stderr, meant.interval()):
            found |= _with_error("slope_intended", meant)
        if self.measured is not None:
            found |= _with_error("measured_delta", self.measured)
            found |= {"ess_fraction": self.measured.ess_fraction, "khat": self.diagnostics.khat}
            found |= {"verdict": VERDICTS[self.diagnostics.verdict], "noise_floor": self.noise_floor}
            found |= {"realized_fraction": self.realized_fraction}
        found |= {} if self.forecast is None else self._of_forecast()
        return {name: float(value) for name, value in found.items() if value is not None}

    def _of_forecast(self) -> dict[str, float | None]:
        """Length in tokens and KL(before‖after) in nats, both per rollout, and reward: slope·η or η²/2 times the Fisher
        information, and measured where the step is not too far for that."""
        found: dict[str, float | None] = {}
        for name in ("length", "reward"):
            change = getattr(self.forecast, name)
            if change is None:
                continue
            first, stderr = change.slope, change.slope.stderr
            found |= {name: change.base, f"{name}_predicted_delta": first.value * self.eta}
            found |= {f"{name}_predicted_delta_stderr": None if stderr is None else stderr * self.eta}
            if self.eta in change.changes:
                found |= _with_error(f"{name}_measured_delta", change.changes[self.eta])
        kl = self.forecast.kl
        if (predicted := kl.forecast(self.eta)) is not None:
            found |= _with_error("kl_predicted", predicted)
        if self.eta in kl.measured:
            found |= _with_error("kl_measured", kl.measured[self.eta])
        return found

    @property
    def eta(self) -> float | None:
        """Where the step lies along `direction`; None without one."""
        return None if self.direction is None else self.direction.step_size

    @property
    def entropy(self) -> float:
        """H̄ before the step, in nats per token."""
        return float(entropy_ratio(self.base, "token", FORM["causal"]).mean)

    def _foreseen(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The change of each parameter as it will be stored, and as it is meant; one and the same in float32."""
        stored = self._change(stepped_copies(optimizer))
        if all(p.dtype.itemsize >= 4 for p in self._parameters.values()):
            return stored, stored
        return stored, self._change(stepped_copies(optimizer, in_float32=True))

    def _change(self, after: dict[int, Tensor]) -> dict[str, Tensor]:
        """after − before by name, in float32 or better; half-precision numbers have exact differences there."""
        return {name: _difference(after[id(p)], self._before[id(p)]) for name, p in self._parameters.items()}

    def _predict(self, policy: Policy, stored: dict[str, Tensor], step_size: float) -> None:
        order = 0 if self.direction is None else 2 if self._watched.in_float32 else 1
        self.base = measure(policy, self.batch, self.direction, order=order, keep_tokens=True, **self._settings)
        if self.direction is not None:
            self.slope = slope(self.base)
            self.curvature = curvature(self.base, estimator="causal", first=self.slope) if order == 2 else None
            self.predicted = predict(self.slope, self.direction.step_size, self.curvature)
        self.slope_intended = self.slope
        if self._intended is not stored:
            meant = _direction(self._intended, step_size)
            table = None if meant is None else measure(policy, self.batch, meant, **self._settings)
            self.slope_intended = None if table is None else slope(table)

    def _realized(self) -> float | None:
        stored = self._change({id(p): p.detach() for p in self._parameters.values()})
        along = sum(float((stored[name].double() * v.double()).sum()) for name, v in self._intended.items())
        square = sum(float(v.double().square().sum()) for v in self._intended.values())
        return along / square if square else None

    def _hold_against_rounding(self) -> None:
        with self._watched.policy(self._before) as policy:
            self.noise_floor = noise_floor(
                policy, self.batch, self.direction, self.base, self.measured, self.slope, self.eta, **self._settings
            )
        if abs(self.measured.delta) < self.noise_floor:
            self.diagnostics = lost_in_rounding(self.diagnostics, self.measured.delta, self.noise_floor)


def _difference(after: Tensor, before: Tensor) -> Tensor:
    wide = torch.promote_types(before.dtype, torch.float32)
    return after.to(wide) - before.to(wide)


def _direction(change: dict[str, Tensor], step_size: float) -> Direction | None:
    """None where nothing moves. η is 1 at the step where there is no learning rate to count in."""
    step_size = step_size if step_size > 0 else 1.0
    moving = {name: x / step_size for name, x in change.items() if x.any()}
    return Direction(moving, step_size) if moving else None


def _with_error(name: str, found: Statistic) -> dict[str, float | None]:
    return {name: found.value, f"{name}_stderr": found.stderr}
