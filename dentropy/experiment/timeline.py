"""The timeline of a replayed run: one row for each step, what they add up to, and the files that say so."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from dentropy import __version__
from dentropy.estimators import Estimate, MeanChange, Statistic
from dentropy.experiment import timeline_figure
from dentropy.experiment.entries import writable
from dentropy.experiment.judges import HELD_OUT, Judged, judge_of
from dentropy.experiment.probe import entropy_per_token
from dentropy.experiment.recorded_run import RecordedRun
from dentropy.experiment.report import replay_page
from dentropy.experiment.results import ProbeResult
from dentropy.experiment.unfinished import temporary
from dentropy.passes.update_attribution import UpdateAttribution
from dentropy.shown import number

SCHEMA_VERSION = 1
STILL = "nothing moved"
UPDATE_TERMS = ("tokens", "momentum", "weight_decay", "unexplained")
REPLAY, TIMELINE, FIGURE, REPORT = "replay.json", "timeline.csv", "timeline.png", "report.html"


def pair_row(result: ProbeResult, step: Judged) -> dict:
    """What the probe of a step says of it, as the change from the checkpoint before to the one after.

    Of a backward probe (from the later checkpoint) what is measured has the other sign, and so has the bend.
    """
    (change,) = result.changes
    sign, size, slope = (-1.0 if step.backward else 1.0), result.step_size, result.slopes["causal"]
    groups, base = slope.groups, entropy_per_token(result.base)[1]
    here = result.base_entropy, result.base_stderr
    there = change.measured.moved_value, groups.stderr(base + change.measured.influence)[0]
    before, after = (there, here) if step.backward else (here, there)
    return {
        **_who(step),
        "n_rollouts": len(result.base),
        "n_tokens": int(result.base.n_tokens.sum()),
        "n_prompts": int(groups.labels.size),
        **_named("entropy_before", *before),
        **_named("entropy_after", *after),
        **_scaled("predicted", slope, size),
        **_scaled("predicted_quadratic", change.quadratic, sign),
        **_scaled("measured", change.measured, sign),
        **_scaled("error", change.error, sign),
        "predicted_uncorrected": size * slope.parts["uncorrected"],
        **_part("pathwise", slope, size),
        **_part("other_answers", slope, size),
        "ess_fraction": change.measured.ess_fraction,
        "khat": change.diagnostics.khat,
        "verdict": change.diagnostics.verdict,
        "verdict_reason": change.diagnostics.reason,
        "noise_floor": change.noise_floor,
        **_mean("reward", result.forecast.reward, change.eta, sign, size),
        **_mean("length", result.forecast.length, change.eta, sign, size),
        **_scaled("kl", result.forecast.kl.measured.get(change.eta), 1.0),
        **_update(result.update, size),
        **_base_weights(result.content["base_weights"]),
        "warnings": "; ".join(result.content["audit"]["warnings"]),
    }


def still_row(step: Judged) -> dict:
    """The row of two checkpoints that are equal in every tensor."""
    changes = {
        name: 0.0 for each in ("predicted", "predicted_quadratic", "measured") for name in (each, f"{each}_stderr")
    }
    return {**_who(step), **changes, "verdict": STILL, "warnings": ""}


def _who(step: Judged) -> dict:
    return {
        "step_before": step.before.step,
        "step_after": step.after.step,
        "judged_by": step.by,
        "rollouts": str(step.rollouts.path),
    }


def logged(step: Judged) -> dict:
    """What the trainer logged of a step; as of now, when the run may have gone on since the step was judged."""
    return {"logged_entropy_before": step.before.logged_entropy, "logged_entropy_after": step.after.logged_entropy}


def pair_text(row: dict) -> str:
    """A step in a line."""
    measured, predicted = (number(row[name], row[f"{name}_stderr"]) for name in ("measured", "predicted"))
    return (
        f"checkpoint {row['step_before']} to {row['step_after']}: ΔH measured {measured}, predicted {predicted} "
        f"nats per token ({judge_of(row)}, {row['verdict']})"
    )


def totals(rows: Sequence[dict]) -> dict:
    """The sums over all steps, and the change as a whole: entropies of the last and the first checkpoint, each by
    rollouts of its own.

    Every step has rollouts of its own, so the variances of their changes add up. The last ones measure the whole too:
    there the difference of sum and whole is the entropy of the checkpoint before, by them.
    """
    found = {}
    for name in ("predicted", "predicted_quadratic", "measured"):
        found |= _sum(name, rows, name)
    first, last = rows[0], rows[-1]
    start = _own_start(first)
    end = [last.get(name) if _backward(last) else None for name in ("entropy_after", "entropy_after_stderr")]
    found |= _named("whole", _total([end[0], _minus(start[0])]), _root([start[1], end[1]]))
    found |= _named("difference", _total([found["measured"], _minus(found["whole"])]), _difference_stderr(rows))
    found |= _logged(rows)
    return found | {"unusable": sum(row["verdict"] == "unusable" for row in rows), "steps": len(rows)}


def write_timeline(out: Path, run: RecordedRun, rows: list[dict]) -> dict:
    """Writes replay.json, timeline.csv, the figure and the page, each whole or not at all; the content of the first."""
    content = writable(
        {
            "schema_version": SCHEMA_VERSION,
            "dentropy": __version__,
            "run": run.kind,
            "notes": list(run.notes),
            "totals": totals(rows),
            "steps": rows,
        }
    )
    _replace(out / TIMELINE, lambda path: _write_csv(path, content["steps"]))
    _replace(out / FIGURE, lambda path: timeline_figure.timeline(content).savefig(path, dpi=150, format="png"))
    picture = (out / FIGURE).read_bytes()
    _replace(out / REPORT, lambda path: path.write_text(replay_page.html(content, picture), encoding="utf-8"))
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    _replace(out / REPLAY, lambda path: path.write_text(text, encoding="utf-8"))
    return content


def summary(content: dict) -> str:
    """What a replay says, in a few lines."""
    found = content["totals"]

    def said(name: str) -> str:
        return number(found[name], found.get(f"{name}_stderr"), "nats per token")

    lines = [
        f"{found['steps']} steps of {content['run']}",
        f"sum of the measured changes   {said('measured')}",
        f"sum of the predicted changes  {said('predicted')}; with curvature {said('predicted_quadratic')}",
    ]
    if found["whole"] is not None:
        lines.append(f"last less first checkpoint    {said('whole')}; the sum differs by {said('difference')}")
    if found["logged"] is not None:
        lines.append(
            f"until checkpoint {found['logged_until']}: measured {said('measured_until')}, logged {found['logged']:.3e}"
        )
    if found["unusable"]:
        lines.append(f"{found['unusable']} of the measurements are unusable")
    warned = sum(bool(row["warnings"]) for row in content["steps"])
    if warned:
        lines.append(f"{warned} steps have warnings: see the column `warnings` of {TIMELINE}")
    return "\n".join(lines + [f"note: {note}" for note in content["notes"]])


def _logged(rows: Sequence[dict]) -> dict:
    """The change from the first to the last checkpoint whose entropy the trainer logged, and what was measured of it.

    A trainer logs the entropy of the policy that it samples from, so there is none of the last one.
    """
    known = [i for i, row in enumerate(rows) if row["logged_entropy_after"] is not None]
    if rows[0]["logged_entropy_before"] is None or not known:
        return {"logged": None, "logged_until": None} | _named("measured_until", None, None)
    until = rows[: known[-1] + 1]
    change = until[-1]["logged_entropy_after"] - rows[0]["logged_entropy_before"]
    return {"logged": change, "logged_until": until[-1]["step_after"]} | _sum("measured", until, "measured_until")


def _sum(name: str, rows: Sequence[dict], called: str) -> dict:
    return _named(called, _total(row[name] for row in rows), _root(row[f"{name}_stderr"] for row in rows))


def _backward(row: dict) -> bool:
    return row["judged_by"] != HELD_OUT


def _own_start(first: dict) -> tuple[float | None, float | None]:
    """The entropy of the first checkpoint by rollouts of its own."""
    if _backward(first):
        return first.get("own_entropy_before"), first.get("own_entropy_before_stderr")
    return first.get("entropy_before"), first.get("entropy_before_stderr")


def _difference_stderr(rows: Sequence[dict]) -> float | None:
    """Of Σ ΔH − (H(last) − H(first)): each batch of rollouts by what is left of it."""
    terms = [row["measured_stderr"] for row in rows]
    if _backward(rows[-1]):
        terms[-1] = rows[-1].get("entropy_before_stderr")
    if not _backward(rows[0]):
        terms[0] = rows[0].get("entropy_after_stderr")
        return _root(terms)
    return _root([_own_start(rows[0])[1], *terms])


def _mean(name: str, change: MeanChange | None, eta: float, sign: float, size: float) -> dict:
    """A quantity at the checkpoint whose rollouts judge, and its change, predicted and measured."""
    slope = None if change is None else change.slope
    measured = None if change is None else change.changes.get(eta)
    found = {name: None if change is None else change.base}
    return found | _scaled(f"{name}_predicted", slope, size) | _scaled(f"{name}_measured", measured, sign)


def _part(name: str, slope: Estimate, size: float) -> dict:
    stderr = slope.part_stderrs.get(name)
    return _named(name, size * slope.parts[name], None if stderr is None else size * stderr)


def _update(found: UpdateAttribution | None, size: float) -> dict:
    """The predicted change by the terms of the step that made it; nothing where it was not asked for."""
    if found is None:
        return {}
    terms = {f"update_{name}": size * getattr(found, name) for name in UPDATE_TERMS}
    return terms | {"update_cosine": found.cosine, "update_noise_fraction": found.noise_fraction}


def _base_weights(found: dict | None) -> dict:
    """What makes rollouts of another sampler count as the checkpoint's own; nothing where they are its own."""
    return {} if found is None else {f"base_weights_{name}": found[name] for name in ("ess_fraction", "verdict")}


def _scaled(name: str, found: Statistic | None, factor: float) -> dict:
    if found is None:
        return _named(name, None, None)
    return _named(name, factor * found.value, None if found.stderr is None else abs(factor) * found.stderr)


def _named(name: str, value: float | None, stderr: float | None) -> dict:
    return {name: None if value is None else float(value), f"{name}_stderr": None if stderr is None else float(stderr)}


def _total(values) -> float | None:
    """The sum, None where one is missing."""
    values = list(values)
    return None if None in values else math.fsum(values)


def _root(stderrs) -> float | None:
    total = _total(None if stderr is None else stderr**2 for stderr in stderrs)
    return None if total is None else math.sqrt(total)


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _write_csv(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    unfinished = temporary(path.parent)
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
