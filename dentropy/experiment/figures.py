"""The pictures of a run, drawn from the content of results.json and the columns of rollouts.csv.

delta_entropy.png    ΔH against η: what the slope predicts, with and without its correction, and what was measured
contributions.png    what each rollout adds to ΔH by the two predictions and by the measurement, on one scale
weights.png          log-weights and effective sample size against η

η is drawn in steps: 1 is the update itself. The page shows the same figures.
"""

from __future__ import annotations

import math

import numpy as np

from dentropy.experiment.drawing import (
    COLOURS,
    WORDS,
    canvas,
    change_unit,
    legend_below,
    logarithmic_from,
    readable_scale,
    signed,
)
from dentropy.experiment.report.answer import causal
from dentropy.experiment.report.numbers import Unit, amount, step_text

DPI = 200
INK, PAPER = COLOURS["ink"], COLOURS["paper"]
# How each kind of measured ΔH is drawn: marker, colour, filling.
MARKS = {
    "measured": ("o", INK, INK),
    "strained": ("o", INK, PAPER),
    "unusable": ("x", COLOURS["muted"], PAPER),
    "noise": ("s", COLOURS["muted"], PAPER),
    "fresh": ("D", COLOURS["fresh"], PAPER),
}
BELIEVED = ("measured", "strained", "fresh")
# From so many rollouts on counts are on a logarithmic axis, which shows the tails.
MANY_ROLLOUTS = 1000


def delta_entropy(content: dict):
    """ΔH against η: predictions as lines, measurements as points with error bars of 2 standard errors."""
    unit, slope, step, points = change_unit(content), causal(content), content["step_size"], _points(content)
    at = [0.0, *(x for found in points.values() for x, _, _ in found)]
    figure, (axes,) = canvas(height=4.2)
    axes.axhline(0, color=COLOURS["rule"], lw=0.8, zorder=0)
    axes.axvline(0, color=COLOURS["rule"], lw=0.8, zorder=0)
    stretched = readable_scale(axes.xaxis, at)
    if stretched and slope["value"]:  # on such a pair of scales the prediction is a straight line
        logarithmic_from(axes.yaxis, abs(slope["value"]) * step * stretched * unit.factor)
    x = _grid(at)
    reach = [0.0, *_predictions(axes, content, x, unit)]
    for kind, found in points.items():
        columns = [np.array(column) for column in zip(*found, strict=True)]
        if kind == "fresh":  # beside the measurement at the same η, not on top of it
            columns[0] = columns[0] * 1.1 if stretched else columns[0] + 0.02 * np.ptp(x)
        ends = _measurements(axes, kind, *columns, unit)
        reach += ends if kind in BELIEVED else []
    plain = None if slope["uncorrected"] is None else slope["uncorrected"] * step * x * unit.factor
    low, high = _limits(reach, plain)
    axes.set_ylim(low, high)
    if plain is not None:
        word = f"{WORDS['uncorrected']}{_beyond(x, plain, low, high)}"
        axes.plot(x, plain, "--", color=COLOURS["uncorrected"], lw=1.8, label=word)
    outside = sum(not low <= y * unit.factor <= high for found in points.values() for _, y, _ in found)
    axes.set_xlabel(_steps_label(content) + (f"\n{outside} measured outside the frame" if outside else ""))
    axes.set_ylabel(f"ΔH ({unit.name})")
    axes.set_title(_finding(content, unit), fontsize=10, loc="left")
    legend_below(figure, axes, 2)
    return figure


def contributions(content: dict, columns: dict[str, np.ndarray]):
    """Histograms of what each rollout adds to ΔH at the measured η nearest to one step, on one scale.

    Measured with prefix weights: the contributions of the causal slope are the derivatives of these.
    """
    entry, unit = _at_step(content), change_unit(content)
    measured = columns[f"delta_contribution_{content['measured'].index(entry)}"]
    panels = [
        ("uncorrected", entry["eta"] * columns["slope_uncorrected"], COLOURS["uncorrected"]),
        ("predicted", entry["eta"] * columns["slope_causal"], COLOURS["predicted"]),
        ("measured", measured, INK),
    ]
    pooled = np.concatenate([values for _, values, _ in panels]) * unit.factor
    # The outermost half per cent goes into the end bins: few long answers would squeeze all else together.
    low, high = np.quantile(pooled, [0.005, 0.995])
    n_bins = int(np.clip(2 * math.sqrt(len(measured)), 8, 60))
    edges = np.linspace(low, high, n_bins + 1) if high > low else np.linspace(low - 1, high + 1, n_bins + 1)
    figure, rows = canvas(3, height=5.8, sharey=True)
    for axes, (name, values, color) in zip(rows, panels, strict=True):
        counts, _ = np.histogram(np.clip(values * unit.factor, edges[0], edges[-1]), edges)
        axes.stairs(counts, edges, fill=True, color=color, alpha=0.85)
        axes.axvline(0, color=COLOURS["muted"], lw=0.8)
        if len(measured) >= MANY_ROLLOUTS:
            axes.set_yscale("log")
        else:
            axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("rollouts", fontsize=9)
        note = f"{name}: sum {amount(float(values.sum()), None, unit)}"
        if values is not measured and math.isfinite(_correlation(values, measured)):
            note += f", correlation with measured {_correlation(values, measured):.2f}"
        axes.set_title(signed(note), fontsize=9, loc="left")
    rows[-1].set_xlabel(f"contribution of one rollout to ΔH ({unit.name});\nthe end bars hold what lies beyond")
    figure.suptitle(f"Rollout by rollout at η = {step_text(entry['eta'])}", fontsize=10, x=0.01, ha="left")
    return figure


def weights(content: dict):
    """Log-weights (quantiles over rollouts) and effective sample size against η."""
    measured = sorted(content["measured"], key=lambda entry: entry["eta"])
    steps = np.array([entry["eta"] / content["step_size"] for entry in measured])
    quantile = {
        name: np.array([entry["log_weight_quantiles"][name] for entry in measured], dtype=float)
        for name in ("min", "p05", "p25", "median", "p75", "p95", "max")
    }
    figure, (top, bottom) = canvas(2, height=4.8)
    top.axhline(0, color=COLOURS["rule"], lw=0.8, zorder=0)
    top.vlines(steps, quantile["p05"], quantile["p95"], color=COLOURS["predicted"], lw=1.5, label="5% to 95%")
    top.vlines(steps, quantile["p25"], quantile["p75"], color=COLOURS["predicted"], lw=6, label="25% to 75%")
    top.plot(steps, quantile["median"], "o", color=PAPER, mec=INK, ms=4, label="median")
    for name in ("min", "max"):
        top.plot(steps, quantile[name], "_", color=INK, ms=8, label="extremes" if name == "min" else None)
    # Most log-weights are small and a few are large: linear near 0, logarithmic beyond.
    spread = np.nanmax(np.abs([quantile["p05"], quantile["p95"]]), initial=0.0)
    if spread > 0:
        logarithmic_from(top.yaxis, 10.0 ** math.floor(math.log10(spread)))
    readable_scale(bottom.xaxis, steps)
    top.set_ylabel("log-weight (nats)")
    bottom.plot(steps, [100 * _number(entry["ess_fraction"]) for entry in measured], "o-", color=INK, ms=5, lw=1.2)
    bottom.set_ylim(0, 105)
    bottom.set_ylabel("ESS (% of rollouts)")
    bottom.set_xlabel(_steps_label(content))
    worst = min(measured, key=lambda entry: _number(entry["ess_fraction"]))
    finding = (
        f"At η = {step_text(worst['eta'])} worth {_number(worst['ess']):.0f} of {content['n_sequences']} rollouts "
        f"(ESS {_number(worst['ess_fraction']):.1%});\n"
        f"the largest weight has {_number(worst['max_weight']):.1%} of the total"
    )
    top.set_title(finding, fontsize=10, loc="left")
    legend_below(figure, top, 4)
    return figure


# What draws each file from the content of results.json and the columns of rollouts.csv.
FIGURES = {
    "delta_entropy.png": lambda content, columns: delta_entropy(content),
    "contributions.png": contributions,
    "weights.png": lambda content, columns: weights(content),
}


def _predictions(axes, content: dict, x: np.ndarray, unit: Unit) -> list[float]:
    """Draw what the causal slope predicts at `x` steps, with its band, and the curvature; returns the band's edges."""
    slope, eta = causal(content), x * content["step_size"]
    curvature = (content.get("curvature") or {}).get("value")
    if slope["value"] is None:
        return []
    line, band = slope["value"] * eta * unit.factor, 2 * (slope["stderr"] or 0.0) * np.abs(eta) * unit.factor
    axes.plot(x, line, color=COLOURS["predicted"], lw=1.8, label=WORDS["predicted"])
    axes.fill_between(x, line - band, line + band, color=COLOURS["predicted"], alpha=0.15, lw=0)
    if curvature is not None:
        bent = line + curvature * eta**2 / 2 * unit.factor
        axes.plot(x, bent, ":", color=COLOURS["predicted"], lw=1.8, label=WORDS["quadratic"])
    return [*(line - band), *(line + band)]


def _measurements(axes, kind: str, at: np.ndarray, value: np.ndarray, bar: np.ndarray, unit: Unit) -> list[float]:
    """Draw the measurements of a kind; returns the ends of their error bars."""
    marker, colour, filling = MARKS[kind]
    value, bar = value * unit.factor, bar * unit.factor
    style = {"fmt": marker, "color": colour, "mfc": filling, "ms": 5, "lw": 1.2, "capsize": 3}
    axes.errorbar(at, value, bar, label=WORDS[kind], **style)
    return [*(value - bar), *(value + bar)]


def _points(content: dict) -> dict[str, list[tuple[float, float, float]]]:
    """(η in steps, ΔH, 2 SE) of the finite measurements, by kind, in nats per token."""
    step, found = content["step_size"], {}
    for entry in sorted(content["measured"], key=lambda entry: entry["eta"]):
        if entry["delta"] is not None:
            found.setdefault(_kind(entry), []).append((entry["eta"] / step, entry["delta"], 2 * (entry["stderr"] or 0)))
    fresh = content.get("fresh_check")
    if fresh is not None and fresh["delta"] is not None:
        found["fresh"] = [(fresh["eta"] / step, fresh["delta"], 2 * (fresh["stderr"] or 0))]
    return found


def _kind(entry: dict) -> str:
    if entry.get("below_noise_floor"):
        return "noise"
    return entry["verdict"] if entry.get("verdict") in MARKS else "measured"


def _grid(values: list[float]) -> np.ndarray:
    """Points from the least to the largest value, 0 among them, dense on either scale."""
    low, high = min(values), max(values)
    smallest = min((abs(value) for value in values if value), default=1.0)
    far = np.geomspace(smallest / 10, max(-low, high, smallest), 101)
    return np.unique(np.clip(np.concatenate([np.linspace(low, high, 51), far, -far, [0.0]]), low, high))


def _limits(reach: list[float], uncorrected: np.ndarray | None) -> tuple[float, float]:
    """Limits that show what is in `reach` at a readable size; an uncorrected line far outside leaves the frame."""
    low, high = min(reach), max(reach)
    if low == high:
        low, high = low - 1, high + 1
    room = 0.7 * (high - low)
    if uncorrected is not None:
        low, high = min(low, max(min(uncorrected), low - room)), max(high, min(max(uncorrected), high + room))
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _beyond(x: np.ndarray, y: np.ndarray, low: float, high: float) -> str:
    """Where a line goes that leaves the frame."""
    far = np.argmax(np.abs(y))
    return "" if low <= y[far] <= high else signed(f" (runs to {y[far]:.3g} at {x[far]:g} steps)")


def _finding(content: dict, unit: Unit) -> str:
    """The numbers at the η nearest to one step."""
    entry = _at_step(content)
    measured = amount(entry["delta"], entry["stderr"], unit)
    predicted = amount(entry["predicted_linear"], entry["predicted_linear_stderr"], unit)
    return (
        f"At η = {step_text(entry['eta'])}: predicted {predicted}, measured {measured},\n"
        f"uncorrected {amount(entry['predicted_uncorrected'], None, unit)} ({unit.name}, ± SE)"
    )


def _at_step(content: dict) -> dict:
    """The measured entry whose η is nearest to one step, and not 0."""
    moved = [entry for entry in content["measured"] if entry["eta"] != 0]
    return min(moved, key=lambda entry: abs(entry["eta"] - content["step_size"]))


def _steps_label(content: dict) -> str:
    return f"η in steps (one step, the update itself, is η = {step_text(content['step_size'])})"


def _number(value: float | None) -> float:
    """A number to draw; not a number for one that is not finite, which results.json writes as null."""
    return math.nan if value is None else value


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else math.nan
