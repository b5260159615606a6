"""ΔH against η as inline SVG: positions in per cent, text and markers in pixels, so it fits any width."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dentropy.experiment.report.answer import causal
from dentropy.experiment.report.numbers import Unit, rounded, step_text, unit_for
from dentropy.experiment.report.tags import Markup, tag

CURVE_POINTS = 41
LEGEND = {
    "uncorrected": "predicted, no length correction",
    "corrected": "predicted, corrected slope ± 2 SE",
    "quadratic": "predicted, with curvature",
    "measured": "measured ± 2 SE",
    "strained": "measured, strained",
    "unusable": "measured, unusable",
    "floor": "measured, below the noise floor",
    "fresh": "fresh rollouts ± 2 SE",
}
LINES = ("uncorrected", "corrected", "quadratic")


@dataclass(frozen=True)
class Frame:
    """The data's limits; x() and y() are positions in per cent of the drawing."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return 100 * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return 100 * (self.high - value) / (self.high - self.low)

    def holds(self, point: Point) -> bool:
        return self.low <= point.y <= self.high


@dataclass(frozen=True)
class Point:
    """A measured change: kind is a key of LEGEND, x in steps, y and bar (2 SE) in nats per token."""

    kind: str
    x: float
    y: float
    bar: float


def change_chart(content: dict) -> Markup | None:
    """The figure with its legend and caption; None where no measurement is finite."""
    points = _points(content)
    if not points:
        return None
    frame = _frame(content, points)
    unit = unit_for((frame.low, frame.high), "nats per token")
    shown = [point for point in points if frame.holds(point)]
    drawing = tag(
        "svg",
        _axes(frame, unit),
        tag(
            "svg",
            _curves(content, frame),
            viewBox="0 0 100 100",
            preserveAspectRatio="none",
            width="100%",
            height="100%",
        ),
        [_marker(point, frame, unit, content["step_size"]) for point in shown],
        class_="plot",
        role="img",
        aria_label="Change of entropy against η; the table below has the numbers.",
    )
    kinds = [*LINES[:2], *(["quadratic"] if _curvature(content) is not None else [])]
    kinds += [kind for kind in LEGEND if any(point.kind == kind for point in shown)]
    outside = len(points) - len(shown)
    beyond = f" {outside} measured value(s) lie outside the frame: see the table." if outside else ""
    caption = (
        "Lines are predicted from the policy before the update alone; a line that leaves the frame goes on. "
        f"One step, the update itself, is η = {step_text(content['step_size'])}.{beyond}"
    )
    return tag(
        "figure",
        tag("p", f"Change of entropy ΔH ({unit.name})", class_="axis-label"),
        tag("div", drawing, class_="plot-area"),
        tag("p", "η in steps", class_="axis-label below"),
        tag("ul", [tag("li", _swatch(kind), LEGEND[kind]) for kind in kinds], class_="legend"),
        tag("figcaption", caption),
    )


def _points(content: dict) -> list[Point]:
    step, points = content["step_size"], []
    for entry in content["measured"]:
        if entry["delta"] is None:
            continue
        verdict = entry.get("verdict")
        kind = verdict if verdict in ("strained", "unusable") else "measured"
        kind = "floor" if entry.get("below_noise_floor") else kind
        points.append(Point(kind, entry["eta"] / step, entry["delta"], 2 * (entry["stderr"] or 0.0)))
    fresh = content.get("fresh_check")
    if fresh is not None and fresh["delta"] is not None:
        points.append(Point("fresh", fresh["eta"] / step, fresh["delta"], 2 * (fresh["stderr"] or 0.0)))
    return points


def _frame(content: dict, points: list[Point]) -> Frame:
    """Limits around the corrected prediction and what can be believed of the measurements, with some room."""
    left, right = min(0.0, *(p.x for p in points)), max(0.0, *(p.x for p in points))
    reach = [0.0]
    slope, step = causal(content), content["step_size"]
    if slope["value"] is not None:
        reach += [slope["value"] * step * x for x in (left, right)]
    for point in points:
        if point.kind not in ("unusable", "floor"):
            reach += [point.y - point.bar, point.y + point.bar]
    low, high = min(reach), max(reach)
    room = 0.1 * (high - low) or 1.0
    if slope["uncorrected"] is not None:  # the line that the correction is about gets more, if it leaves
        ends = [slope["uncorrected"] * step * x for x in (left, right)]
        low, high = min(low, max(min(ends), low - 6 * room)), max(high, min(max(ends), high + 6 * room))
    side = 0.04 * (right - left) or 1.0
    return Frame(left - side, right + side, low - room, high + room)


def _curvature(content: dict) -> float | None:
    return (content.get("curvature") or {}).get("value")


def _curves(content: dict, frame: Frame) -> list[Markup]:
    slope, step, curvature = causal(content), content["step_size"], _curvature(content)
    x = np.linspace(frame.left, frame.right, CURVE_POINTS)
    drawn = []
    if slope["value"] is not None:
        line, band = slope["value"] * step * x, 2 * (slope["stderr"] or 0.0) * step * np.abs(x)
        # Through 0, where the band closes.
        at = np.sort(np.append(x, 0.0))
        upper, lower = (np.interp(at, x, line + side * band) for side in (1, -1))
        for edge in (upper, lower):
            edge[at == 0] = 0.0
        outline = np.append(at, at[::-1]), np.append(upper, lower[::-1])
        drawn.append(tag("polygon", points=_path(frame, *outline), class_="band"))
        if curvature is not None:
            drawn.append(_line("quadratic", frame, x, line + curvature * (step * x) ** 2 / 2))
        drawn.append(_line("corrected", frame, x, line))
    if slope["uncorrected"] is not None:
        drawn.insert(0, _line("uncorrected", frame, x, slope["uncorrected"] * step * x))
    return drawn


def _line(kind: str, frame: Frame, x: np.ndarray, y: np.ndarray) -> Markup:
    return tag("polyline", points=_path(frame, x, y), class_=f"line {kind}")


def _path(frame: Frame, x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{frame.x(a):.3f},{frame.y(b):.3f}" for a, b in zip(x, y, strict=True))


def _axes(frame: Frame, unit: Unit) -> list[Markup]:
    drawn = []
    for value in _ticks(frame.low, frame.high):
        y, kind = f"{frame.y(value):.3f}%", "zero" if value == 0 else "grid"
        drawn.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_=kind))
        text = f"{value * unit.factor:.6g}".replace("-", "−")
        drawn.append(tag("text", text, x="-8", y=y, dy="0.35em", text_anchor="end"))
    for value in _ticks(frame.left, frame.right):
        x, text = f"{frame.x(value):.3f}%", f"{value:.6g}".replace("-", "−")
        drawn.append(tag("line", x1=x, x2=x, y1="0", y2="100%", class_="zero" if value == 0 else "grid"))
        drawn.append(tag("text", text, x=x, y="100%", dy="1.5em", text_anchor="middle"))
    return drawn


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between `low` and `high`."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * 0.9)
    return [n * gap for n in range(math.ceil(low / gap), math.floor(high / gap) + 1)]


def _marker(point: Point, frame: Frame, unit: Unit, step: float) -> Markup:
    # The fresh check stands beside the measurement at the same η, not on top of it.
    x = f"{frame.x(point.x) + (1.5 if point.kind == 'fresh' else 0):.3f}%"
    stderr = point.bar / 2
    error = f" ± {rounded(stderr, stderr, factor=unit.factor)}" if point.bar else ""
    said = f"{LEGEND[point.kind].removesuffix(' ± 2 SE')} at η = {step_text(point.x * step)}: "
    said += f"{rounded(point.y, stderr, factor=unit.factor)}{error} ({unit.name})"
    reach = point.y + point.bar, point.y - point.bar
    caps = [
        tag("svg", tag("line", x1="-4", x2="4", y1="0", y2="0"), x=x, y=f"{frame.y(end):.3f}%")
        for end in reach
        if frame.low <= end <= frame.high
    ]
    top, bottom = (f"{min(max(frame.y(end), 0.0), 100.0):.3f}%" for end in reach)
    bars = [tag("line", x1=x, x2=x, y1=top, y2=bottom), caps] if point.bar else None
    shape = tag("svg", _shape(point.kind), x=x, y=f"{frame.y(point.y):.3f}%")
    return tag("g", tag("title", said), bars, shape, class_=f"point {point.kind}")


def _shape(kind: str) -> Markup:
    if kind == "unusable":
        return tag("path", d="M-5 -5 L5 5 M-5 5 L5 -5")
    if kind == "fresh":
        return tag("path", d="M0 -6 L6 0 L0 6 L-6 0 Z")
    if kind == "floor":
        return tag("rect", x="-4", y="-4", width="8", height="8")
    return tag("circle", r="4.5", cx="0", cy="0")


def _swatch(kind: str) -> Markup:
    shape = (
        tag("line", x1="-14", x2="14", y1="0", y2="0", class_=f"line {kind}")
        if kind in LINES
        else tag("g", _shape(kind), class_=f"point {kind}")
    )
    return tag("svg", shape, viewBox="-16 -8 32 16", width="32", height="16", aria_hidden="true")
