"""The figures of a run, drawn from the content of results.json and the columns of rollouts.csv.

delta_entropy.png    ΔH against η: what the uncorrected and the corrected slope predict, and what was measured
contributions.png    what each rollout adds to ΔH by the two predictions and by the measurement, on one scale
weights.png          log-weights and effective sample size against η

η is drawn in steps: 1 is the update itself.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

# Okabe and Ito's colours, which stay apart for colour-blind readers.
UNCORRECTED, CORRECTED, MEASURED, FRESH, NOISE = "#D55E00", "#0072B2", "#000000", "#009E73", "#BBBBBB"


def write(path: Path, content: dict, columns: dict[str, np.ndarray]) -> None:
    """Draw the figure whose file name `path` has, one of FIGURES."""
    FIGURES[path.name](content, columns).savefig(path, dpi=150)


def delta_entropy(content: dict):
    """ΔH against η: predictions as lines, measurements as points with error bars of 2 standard errors."""
    measured = sorted(content["measured"], key=lambda entry: entry["eta"])
    steps = _steps(content, measured)
    delta = np.array([entry["delta"] for entry in measured])
    bars = np.array([entry["stderr"] or 0.0 for entry in measured])
    slope = next(entry for entry in content["slope"] if entry["estimator"] == "causal")
    scale, unit = _unit(np.abs(delta) + 2 * bars)
    x = np.array([min(0.0, steps.min()), max(0.0, steps.max())])
    corrected = slope["value"] * content["step_size"] * x * scale
    band = 2 * (slope["stderr"] or 0.0) * content["step_size"] * np.abs(x) * scale
    uncorrected = slope["uncorrected"] * content["step_size"] * x * scale

    figure, (axes,) = _figure(1, height=4.8)
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes.axvline(0, color="0.8", lw=0.8, zorder=0)
    (line,) = axes.plot(x, uncorrected, "--", color=UNCORRECTED, lw=1.8, label="predicted, uncorrected slope")
    axes.plot(x, corrected, color=CORRECTED, lw=1.8, label="predicted, corrected slope (causal) ± 2 SE")
    if content["curvature"] is not None:
        dense = np.linspace(x[0], x[1], 201)
        eta = dense * content["step_size"]
        bent = (slope["value"] * eta + content["curvature"]["value"] * eta**2 / 2) * scale
        axes.plot(dense, bent, ":", color=CORRECTED, lw=1.8, label="with curvature")
    # Through 0, where the band closes: a fill between the ends alone would cut the corner.
    bow = np.insert(np.stack([x, corrected - band, corrected + band]), 1, 0.0, axis=1)
    axes.fill_between(*bow, color=CORRECTED, alpha=0.15, lw=0)
    reach = [corrected - band, corrected + band]
    noise = np.array([entry["below_noise_floor"] for entry in measured])
    doubtful = np.array([entry["verdict"] != "reliable" for entry in measured]) & ~noise
    for chosen, color, fill, label in (
        (~noise & ~doubtful, MEASURED, MEASURED, "measured (importance sampling) ± 2 SE"),
        (doubtful, MEASURED, "white", "measured, strained or unusable ± 2 SE"),
        (noise, NOISE, NOISE, "below the noise floor: rounding, not data"),
    ):
        if chosen.any():
            points = steps[chosen], delta[chosen] * scale, 2 * bars[chosen] * scale
            reach += _points(axes, *points, "o", color, fill, label)
    fresh = content["fresh_check"]
    if fresh is not None:
        aside = 0.015 * (x[1] - x[0])  # beside the measurement at the same η, not on top of it
        at, value = fresh["eta"] / content["step_size"] + aside, fresh["delta"] * scale
        bar = 2 * (fresh["stderr"] or 0.0) * scale
        reach += _points(axes, [at], [value], [bar], "D", FRESH, "white", "fresh rollouts of the moved policy ± 2 SE")
    _limit(axes, np.concatenate(reach), line)
    axes.set_xlabel(_steps_label(content))
    axes.set_ylabel(f"change of entropy ΔH ({unit}nats per token)")
    axes.legend(loc="best", frameon=False, fontsize=9)
    entry = _at_step(content)
    change = _pm(entry["delta"], entry["stderr"], scale)
    predicted = _pm(entry["predicted_linear"], entry["predicted_linear_stderr"], scale)
    finding = (
        f"At η = {entry['eta']:g} the entropy changes by {change} ({unit}nats per token);\n"
        f"predicted: {predicted} with the length correction, "
        f"{entry['predicted_uncorrected'] * scale:.2f} without"
    )
    axes.set_title(_signed(finding), fontsize=11, loc="left")
    return figure


def contributions(content: dict, columns: dict[str, np.ndarray]):
    """Histograms of what each rollout adds to ΔH at the measured η nearest to one step, on one scale.

    Measured with prefix weights: the contributions of the causal slope are the derivatives of these.
    """
    entry = _at_step(content)
    eta, index = entry["eta"], content["measured"].index(entry)
    measured = columns[f"delta_contribution_{index}"]
    panels = [
        ("predicted, uncorrected slope", eta * columns["slope_uncorrected"], UNCORRECTED),
        ("predicted, corrected slope (causal)", eta * columns["slope_causal"], CORRECTED),
        ("measured", measured, MEASURED),
    ]
    pooled = np.concatenate([values for _, values, _ in panels])
    scale, unit = _unit(pooled)
    # The outermost half per cent goes into the end bins: few long answers would squeeze all else together.
    low, high = np.quantile(pooled, [0.005, 0.995]) * scale
    edges = np.linspace(low, high, 61) if high > low else np.linspace(low - 1, high + 1, 61)
    figure, rows = _figure(3, height=7.0, sharey=True)
    for axes, (name, values, color) in zip(rows, panels, strict=True):
        axes.hist(np.clip(values * scale, edges[0], edges[-1]), bins=edges, color=color, alpha=0.85)
        axes.axvline(0, color="0.6", lw=0.8)
        axes.set_yscale("log")
        axes.set_ylabel("rollouts")
        note = f"{name}: sum {values.sum():.3g} nats per token"
        if values is not measured and math.isfinite(_correlation(values, measured)):
            note += f", correlation with measured {_correlation(values, measured):.2f}"
        axes.set_title(_signed(note), fontsize=9, loc="left")
    rows[-1].set_xlabel(f"contribution of one rollout to ΔH ({unit}nats per token); end bars hold what lies beyond")
    corrected, plain = (_correlation(values, measured) for values in (panels[1][1], panels[0][1]))
    finding = f"Rollout by rollout at η = {eta:g}"
    if math.isfinite(corrected) and math.isfinite(plain):
        finding += (
            f": the corrected slope correlates {corrected:.2f}\nwith the measurement, the uncorrected one {plain:.2f}"
        )
    figure.suptitle(_signed(finding), fontsize=11, x=0.01, ha="left")
    return figure


def weights(content: dict):
    """Log-weights (quantiles over rollouts) and effective sample size against η."""
    measured = sorted(content["measured"], key=lambda entry: entry["eta"])
    steps = _steps(content, measured)
    quantile = {
        name: np.array([entry["log_weight_quantiles"][name] for entry in measured])
        for name in ("min", "p05", "p25", "median", "p75", "p95", "max")
    }
    ess = [100 * entry["ess_fraction"] for entry in measured]
    figure, (top, bottom) = _figure(2, height=5.6)
    top.axhline(0, color="0.8", lw=0.8, zorder=0)
    top.vlines(steps, quantile["p05"], quantile["p95"], color=CORRECTED, lw=1.5, label="5% to 95% of rollouts")
    top.vlines(steps, quantile["p25"], quantile["p75"], color=CORRECTED, lw=6, label="25% to 75%")
    top.plot(steps, quantile["median"], "o", color="white", mec=MEASURED, ms=4, label="median")
    for name in ("min", "max"):
        top.plot(steps, quantile[name], "_", color=MEASURED, ms=8, label="extremes" if name == "min" else None)
    # Most log-weights are small and a few are large: linear near 0, logarithmic beyond.
    spread = max(np.abs(quantile["p05"]).max(), np.abs(quantile["p95"]).max())
    if spread > 0:
        top.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(spread)))
        top.yaxis.set_major_formatter("{x:g}")
    top.set_ylabel("log-weight (nats; logarithmic away from 0)")
    top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4, frameon=False, fontsize=9)
    bottom.plot(steps, ess, "o-", color=MEASURED, ms=5, lw=1.2)
    bottom.set_ylim(0, 105)
    bottom.set_ylabel("ESS (% of rollouts)")
    bottom.set_xlabel(_steps_label(content))
    worst = min(measured, key=lambda entry: entry["ess_fraction"])
    finding = (
        f"At η = {worst['eta']:g} the weighted rollouts are worth {worst['ess']:.0f} "
        f"of {content['n_sequences']} (ESS {worst['ess_fraction']:.1%});\n"
        f"the largest weight has {worst['max_weight']:.1%} of the total"
    )
    top.set_title(_signed(finding), fontsize=11, loc="left")
    return figure


# What draws each file from the content of results.json and the columns of rollouts.csv.
FIGURES = {
    "delta_entropy.png": lambda content, columns: delta_entropy(content),
    "contributions.png": contributions,
    "weights.png": lambda content, columns: weights(content),
}


def _figure(rows: int, *, height: float, sharey: bool = False):
    """A figure of its own, outside pyplot's global state, with `rows` axes that share their x axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, sharey=sharey, squeeze=False)[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9)
    return figure, axes


def _points(axes, x, y, bars, marker: str, color: str, fill: str, label: str) -> list[np.ndarray]:
    """Draw points with error bars; returns the lower and the upper ends of the bars."""
    axes.errorbar(x, y, bars, label=label, fmt=marker, color=color, mfc=fill, ms=5, lw=1.2, capsize=3)
    return [np.subtract(y, bars), np.add(y, bars)]


def _limit(axes, main: np.ndarray, uncorrected) -> None:
    """Limits that show `main` at a readable size; an uncorrected line far outside leaves the frame."""
    low, high = min(main.min(), 0.0), max(main.max(), 0.0)
    room = 0.7 * (high - low) or 1.0
    x, y = uncorrected.get_data()
    low, high = min(low, max(y.min(), low - room)), max(high, min(y.max(), high + room))
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    far = np.argmax(np.abs(y))
    if not low <= y[far] <= high:
        uncorrected.set_label(_signed(f"{uncorrected.get_label()} (runs to {y[far]:.3g} at {x[far]:g} steps)"))


def _at_step(content: dict) -> dict:
    """The measured entry whose η is nearest to one step, and not 0."""
    moved = [entry for entry in content["measured"] if entry["eta"] != 0]
    return min(moved, key=lambda entry: abs(entry["eta"] - content["step_size"]))


def _steps(content: dict, measured: list[dict]) -> np.ndarray:
    return np.array([entry["eta"] / content["step_size"] for entry in measured])


def _steps_label(content: dict) -> str:
    return f"η in steps (one step, the update itself, is η = {content['step_size']:g})"


def _unit(values: np.ndarray) -> tuple[float, str]:
    """A power of ten that brings the largest value to 1..1000, as a factor and as text for a label."""
    largest = np.nanmax(np.abs(values))
    exponent = 3 * math.floor(math.log10(largest) / 3) if largest > 0 else 0
    superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return 10.0**-exponent, "" if exponent == 0 else f"10{superscript} "


def _signed(text: str) -> str:
    """The text with real minus signs."""
    return text.replace("-", "−")


def _pm(value: float, stderr: float | None, scale: float) -> str:
    return f"{value * scale:.2f}" + ("" if stderr is None else f" ± {stderr * scale:.2f}")


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else math.nan
