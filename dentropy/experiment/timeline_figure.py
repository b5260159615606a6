"""timeline.png: the change of entropy of each step, predicted and measured, and the entropy from step to step."""

from __future__ import annotations

import numpy as np

from dentropy.experiment.drawing import COLOURS, NATS, canvas
from dentropy.experiment.report.numbers import Unit, unit_for


def timeline(content: dict):
    """ΔH of each step above, entropy below: by rollouts of each checkpoint, by adding up, and as it was logged."""
    rows = content["steps"]
    figure, (top, bottom) = canvas(2, height=6.4)
    _changes(top, rows)
    _entropies(bottom, rows)
    bottom.set_xlabel("optimizer step")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    return figure


def change_unit(rows: list[dict]) -> Unit:
    """The unit of every ΔH of a replay, in figure and page."""
    return unit_for([row[name] for row in rows for name in ("measured", "predicted")], NATS)


def _changes(axes, rows: list[dict]) -> None:
    measured, unit = _column(rows, "measured"), change_unit(rows)
    scale = unit.factor
    middle = (_column(rows, "step_before") + _column(rows, "step_after")) / 2
    aside = 0.06 * np.min(_column(rows, "step_after") - _column(rows, "step_before"))
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    for name, shift, color, label in (
        ("predicted", -aside, COLOURS["predicted"], "predicted, slope ± 2 SE"),
        ("measured", aside, COLOURS["ink"], "measured ± 2 SE"),
    ):
        value, stderr = _column(rows, name) * scale, _column(rows, f"{name}_stderr") * scale
        axes.errorbar(middle + shift, value, 2 * stderr, fmt="o", ms=4, lw=1, capsize=2, color=color, label=label)
    unusable = np.array([row["verdict"] == "unusable" for row in rows])
    if unusable.any():
        at = (middle + aside)[unusable], measured[unusable] * scale
        axes.plot(*at, "x", color=COLOURS["uncorrected"], ms=9, label="unusable")
    logged = (_column(rows, "logged_entropy_after") - _column(rows, "logged_entropy_before")) * scale
    if np.isfinite(logged).any():
        axes.plot(middle, logged, "_", color=COLOURS["fresh"], ms=10, label="difference of logged entropies")
    axes.set_ylabel(f"ΔH of a step\n({unit.name})")
    _legend_above(axes)


def _entropies(axes, rows: list[dict]) -> None:
    steps = np.append(rows[0]["step_before"], _column(rows, "step_after"))
    own = np.append(_number(rows[0].get("own_entropy_before")), _column(rows, "entropy_after"))
    errors = np.append(_number(rows[0].get("own_entropy_before_stderr")), _column(rows, "entropy_after_stderr"))
    logged = np.append(_number(rows[0]["logged_entropy_before"]), _column(rows, "logged_entropy_after"))
    start = own[0] if np.isfinite(own[0]) else _number(rows[0].get("entropy_before"))
    for name, style, color in (("measured", "-", COLOURS["ink"]), ("predicted", "--", COLOURS["predicted"])):
        summed = start + np.append(0.0, np.cumsum(_column(rows, name)))
        axes.plot(steps, summed, style, color=color, lw=1.2, label=f"first, and the sum of what was {name}")
    axes.errorbar(steps, own, 2 * errors, fmt="o", ms=4, lw=1, capsize=2, color="0.45", label="each by rollouts ± 2 SE")
    if np.isfinite(logged).any():
        axes.plot(steps, logged, "+", color=COLOURS["fresh"], ms=8, label="as the trainer logged it")
    axes.set_ylabel("entropy\n(nats per token)")
    _legend_above(axes)


def _legend_above(axes) -> None:
    """Where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, frameon=False, fontsize=8)


def _column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([_number(row.get(name)) for row in rows])


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
