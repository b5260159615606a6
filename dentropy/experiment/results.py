"""What `probe` returns, and its ways out: results.json, the columns of rollouts.parquet, the run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from dentropy.estimators import Estimate, Forecast, OnPolicyAudit, ProxyGrade, TrustRange
from dentropy.experiment import (
    base_weight_entry,
    entries,
    forecast_entry,
    proxies,
    rollout_rows,
    run_folder,
    update_groups,
    update_tokens,
)
from dentropy.experiment.changes import Change, FreshCheck
from dentropy.experiment.cost import forward_passes
from dentropy.experiment.glance import changes_table, rollouts_text
from dentropy.experiment.saved_run import SavedRun
from dentropy.experiment.summary import summary
from dentropy.passes.update_attribution import UpdateAttribution
from dentropy.passes.update_groups import UpdateGroup
from dentropy.rollouts.batch import PackedBatch
from dentropy.shown import count, data_frame, lines, number
from dentropy.stats.tables import SequenceSums


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What `probe` found. Entropies are in nats per token, slopes in nats per token per unit of η.

    Attributes:
        base: The table at the base weights, with tangent columns and kept tokens.
        base_entropy: H̄.
        base_stderr: Its standard error; None where the groups do not allow one.
        slopes: The slope by each of the three estimators: "causal", "exact", "mixed".
        curvature: R'', the causal one; None with no_curvature, the reason: half precision, or values that jump within
            a step.
        exact_curvature: The exact one; None where `curvature` is.
        trust: How far predictions reach; None without a curvature.
        changes: Prediction and measurement at each η, in the order given.
        forecast: What the step buys and costs: entropy, reward, length, pass@k, KL divergence.
        parameters: Contribution of every parameter that moves to the causal slope, by name; None if not asked for.
        audit: Do the rollouts look like samples of this policy?
        without_end: Rollouts that do not end with an end token of the policy; None where it has none.
        batch: The rollouts, without those dropped.
        step_size: The η that is the update itself.
        prompts: "random" or "fixed": what the standard errors are for.
        dtype: Of the weights in the pass.
        device: Where it ran.
        cost: Its passes by kind and the tokens they ran, as results.md describes.
        update: The shares of the update's own tokens; None if not asked for.
        groups: Groups of these tokens with error bars, by name; None for one without a token that counts.
        proxies: Published proxies, graded by these shares, by name.
        seeds: Free for the caller: random seeds by name.
        source: Free for the caller: where policy, rollouts and update came from, by name.
        fresh: Free for the caller: the comparison with rollouts of the moved policy.
        date: When `probe` was called, UTC, as ISO 8601 writes it.
        seconds: What it took.
        command: Free for the caller: the command line that called it.
        dropped: The rollouts left out because their statistics were not finite, by their place in the batch given.
    """

    base: SequenceSums
    base_entropy: float
    base_stderr: float | None
    slopes: dict[str, Estimate]
    curvature: Estimate | None
    exact_curvature: Estimate | None
    no_curvature: str | None
    trust: TrustRange | None
    changes: tuple[Change, ...]
    forecast: Forecast
    parameters: dict[str, float] | None
    audit: OnPolicyAudit
    without_end: int | None
    batch: PackedBatch
    step_size: float
    prompts: str
    dtype: str
    device: str
    cost: dict[str, int]
    update: UpdateAttribution | None = None
    groups: dict[str, UpdateGroup | None] = field(default_factory=dict)
    proxies: dict[str, ProxyGrade] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    fresh: FreshCheck | None = None
    date: str | None = None
    seconds: float | None = None
    command: str | None = None
    dropped: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """What was found at the η nearest to the step itself; `summary` has all."""
        near = min(self.changes, key=lambda change: abs(change.eta - self.step_size))
        slope, unit = self.slopes["causal"], "nats per token"
        sizes = len(self.base), np.unique(self.base.group).size, int(self.base.n_tokens.sum())
        rows = [
            ("rollouts", rollouts_text(*sizes, self.dtype, self.device)),
            ("entropy", number(self.base_entropy, self.base_stderr, unit)),
            ("slope", number(slope.value, slope.stderr, f"{unit} per unit of η")),
            (f"ΔH at η = {near.eta:g}", f"predicted {number(near.linear.value, near.linear.stderr, unit)}"),
            ("", f"measured  {number(near.measured.value, near.measured.stderr, unit)}, {near.diagnostics.verdict}"),
        ]
        return lines(self, rows)

    def _repr_html_(self) -> str:
        """Prediction and measurement at every η, for a notebook."""
        return changes_table(self.content)

    @staticmethod
    def load(folder: str | Path) -> SavedRun:
        """What `save`, or a command, wrote, by this version or an earlier one.

        Raises:
            ValueError: Where the folder, its results.json or the schema of that are not those of a finished run.
        """
        return SavedRun(Path(folder), run_folder.load(folder))

    @property
    def noise_floor(self) -> float:
        """The largest of the changes', in nats per token."""
        return max(change.noise_floor for change in self.changes)

    @property
    def etas(self) -> tuple[float, ...]:
        """The η of `changes`."""
        return tuple(change.eta for change in self.changes)

    @cached_property
    def content(self) -> dict:
        """The content of results.json, as results.md describes it: plain numbers, strings, lists and dicts."""
        n_tokens, causal = int(self.base.n_tokens.sum()), self.slopes["causal"]
        content = {
            "schema_version": run_folder.SCHEMA_VERSION,
            "versions": entries.versions(),
            "device": self.device,
            "dtype": self.dtype,
            "provenance": {
                "date": self.date,
                "command": self.command,
                "seconds": self.seconds,
                "forward_passes": forward_passes(self.cost, n_tokens),
            },
            "cost": dict(self.cost),
            "source": dict(self.source),
            "seeds": dict(self.seeds),
            "n_sequences": len(self.base),
            "n_tokens": n_tokens,
            "n_groups": int(np.unique(self.base.group).size),
            "temperature": self._temperature(),
            "step_size": float(self.step_size),
            "prompts": self.prompts,
            "base_entropy": self.base_entropy,
            "base_entropy_stderr": self.base_stderr,
            "base_weights": self._base_weights,
            "scale": 1 / n_tokens,
            "slope": [entries.slope(estimate) for estimate in self.slopes.values()],
            "horizon": entries.horizon(self.base, self.prompts),
            "curvature": self._curvature(),
            "no_curvature": self.no_curvature,
            "trust": None if self.trust is None else entries.trust(self.trust),
            "measured": [entries.measured(change, causal) for change in self.changes],
            "noise_floor": self.noise_floor,
            "forecast": forecast_entry.forecast(self.forecast, self.etas),
            "attribution": entries.attribution(self.base, self.prompts, self.parameters),
            "update_attribution": None if self.update is None else update_tokens.entry(self.update),
            "update_groups": update_groups.entry(self.groups),
            "proxies": proxies.entry(self.proxies, self.changes, self.step_size),
            "fresh_check": None if self.fresh is None else dict(vars(self.fresh)),
            "audit": self._audit(),
        }
        return entries.writable(content)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of rollouts.parquet, [S] each: one row per rollout, in the batch's order; see results.md."""
        estimates = {f"slope_{name}": estimate for name, estimate in self.slopes.items()}
        if self.curvature is not None:
            estimates |= {"curvature": self.curvature, "curvature_exact": self.exact_curvature}
        found = rollout_rows.columns(self.base, self.batch.reward, estimates, self.changes)
        return found | {"rollout": self._place_given(found["rollout"])}

    def to_pandas(self):
        """`columns` as a pandas DataFrame: the table of rollouts.parquet. ImportError without pandas."""
        return data_frame(self.columns())

    def save(self, out: str | Path, tokenizer=None) -> Path:
        """Write the run folder `out`, as results.md describes it.

        Args:
            out: A new folder, or one that exists and is empty.
            tokenizer: To show rollouts as text in report.html; without it they are token ids.

        Returns:
            The folder's path.

        Raises:
            ValueError: Where `out` exists and is not an empty folder, or cannot be written.
            OSError: Where writing fails, as on a full disk; then nothing is left there.
            run_folder.ViewsFailedError: Where the report or a figure fails; results.json, the table of rollouts and
                the others are in the folder.
        """

        def shown() -> list[dict]:
            return rollout_rows.largest(self.base, self.batch, self.slopes["exact"].contributions, tokenizer)

        if self.update is None:
            return run_folder.save(out, self.content, self.columns(), shown)
        return run_folder.save(
            out,
            self.content,
            self.columns(),
            shown,
            update_tokens.columns(self.update),
            lambda: update_tokens.largest(self.update, tokenizer),
        )

    def summary(self) -> str:
        """The result as a text to read."""
        return summary(self.content)

    @cached_property
    def _base_weights(self) -> dict | None:
        return base_weight_entry.entry(self.base, self.prompts)

    def _curvature(self) -> dict | None:
        if self.curvature is None:
            return None
        return entries.curvature(self.curvature, self.exact_curvature, self.base)

    def _audit(self) -> dict:
        """What was used of the batch, what adds up, and whether the rollouts are this policy's own."""
        sums = {f"slope_{name}": (e.contributions.sum(), e.value) for name, e in self.slopes.items()}
        for index, change in enumerate(self.changes):
            m = change.measured
            sums[f"delta_{index}"] = (m.contributions.sum(), m.moved_value - m.base_value)
        if self.parameters is not None:
            sums["parameters"] = (sum(self.parameters.values()), self.slopes["causal"].value)
        checks = {name: check for name, check in vars(self.audit).items() if name != "warnings"}
        always = ("logp_plus_entropy", "dlogp")
        checks = {name: check for name, check in checks.items() if check is not None or name in always}
        return {
            "rollouts_used": len(self.base),
            "rollouts_expected": len(self.batch) + len(self.dropped),
            "rollouts_dropped": list(self.dropped),
            "tokens_used": int(self.base.n_tokens.sum()),
            "tokens_expected": int(self.batch.n_tokens),
            "contributions": {k: {"sum": float(total), "expected": float(value)} for k, (total, value) in sums.items()},
            "on_policy": {name: None if check is None else dict(vars(check)) for name, check in checks.items()},
            "rollouts_without_end": self.without_end,
            "warnings": [
                *self.audit.warnings,
                *base_weight_entry.warnings(self._base_weights),
                *self._no_ends(),
                *self._dropped(),
            ],
        }

    def _temperature(self) -> float | list[float]:
        found = np.unique(self.batch.temperatures).tolist()
        return found[0] if len(found) == 1 else found

    def _place_given(self, rollouts: np.ndarray) -> np.ndarray:
        """Their places in the batch that was given, before any were dropped."""
        return np.setdiff1d(np.arange(len(self.batch) + len(self.dropped)), self.dropped)[rollouts]

    def _dropped(self) -> list[str]:
        if not self.dropped:
            return []
        named = ", ".join(map(str, self.dropped[:8])) + (", ..." if len(self.dropped) > 8 else "")
        return [f"{count(len(self.dropped), 'rollout')} dropped, whose statistics are not finite: {named}"]

    def _no_ends(self) -> list[str]:
        """A warning where not one rollout has an end token: so they were written down, not sampled."""
        if self.without_end != len(self.batch):
            return []
        return [
            "no rollout ends with an end token of the policy: text dumps leave them out (append_eos puts them back), "
            "and without them the estimates miss every decision to stop"
        ]
