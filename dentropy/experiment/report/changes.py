"""The sections on ΔH: predicted and measured at every η, and whether the measurements can be believed."""

from __future__ import annotations

from dentropy.experiment.readings import disagreement, entry_told_apart, forms_apart, part
from dentropy.experiment.report.answer import causal, times
from dentropy.experiment.report.chart import change_chart
from dentropy.experiment.report.numbers import (
    Unit,
    interval,
    number,
    percent,
    plain,
    quantity,
    step_text,
    unit_for,
    with_error,
)
from dentropy.experiment.report.sections import NATS, reasons, section
from dentropy.experiment.report.tables import table
from dentropy.experiment.report.tags import Markup, tag

SIGNS = {"reliable": "●", "strained": "◐", "unusable": "✕"}
NEAR = "ΔH not told apart from 0"
KHATS = {"w": "w", "wT": "w·T", "wH": "w·H"}


def changes(content: dict) -> Markup:
    """Predicted and measured ΔH at every η: figure, table, trust."""
    rows = content["measured"]
    unit = unit_for([row["delta"] for row in rows], NATS)

    def pair(name: str, error: str | None = None):
        return _pair(unit, name, error)

    def uncorrected_error(row: dict) -> float | None:
        return times(part(causal(content), "uncorrected")[1], abs(row["eta"]))

    columns = [
        ("η", "", lambda row: number(row["eta"], step_text(row["eta"]))),
        ("Steps", "", lambda row: _steps(row, content)),
        ("Measured ΔH", "± SE", pair("delta", "stderr")),
        ("95% interval", "", lambda row: interval(row.get("interval"), unit, row["stderr"])),
        ("Weights", "and what ΔH says", _verdict_beside),
        ("Predicted", "linear ± SE", pair("predicted_linear")),
        ("Predicted", "with curvature ± SE", pair("predicted_quadratic")),
        ("Linear − measured", "± SE", pair("prediction_error")),
        ("Uncorrected", "± SE", lambda row: with_error(row["predicted_uncorrected"], uncorrected_error(row), unit)),
    ]
    return section(
        "changes",
        "Change of entropy",
        change_chart(content),
        table(f"ΔH(η) in {unit.name}", rows, columns),
        [tag("p", f"{apart}.") for apart in (disagreement(rows), forms_apart(rows)) if apart],
        reasons(rows),
        _sequence(content, unit),
        _fresh(content.get("fresh_check"), unit),
    )


def _sequence(content: dict, unit: Unit) -> Markup | None:
    """The same with sequence weights, folded away; None for a run that measured with these alone."""
    rows = [{"eta": row["eta"], **row["sequence"]} for row in content["measured"] if row.get("sequence")]
    if not rows:
        return None
    columns = [
        ("η", "", lambda row: number(row["eta"], step_text(row["eta"]))),
        ("Measured ΔH", "± SE", _pair(unit, "delta", "stderr")),
        ("95% interval", "", lambda row: interval(row.get("interval"), unit, row["stderr"])),
        ("Weights", "verdict and why", _reasoned_verdict),
        ("ESS", "of all", lambda row: percent(row.get("ess_fraction"))),
        ("Predicted", "linear, exact slope ± SE", _pair(unit, "predicted_linear")),
        ("Predicted", "with exact curvature ± SE", _pair(unit, "predicted_quadratic")),
        ("Linear − measured", "± SE", _pair(unit, "prediction_error")),
        ("Prefix − sequence", "ΔH ± SE", _pair(unit, "difference")),
    ]
    note = (
        "Above, a token is weighed by what came before it alone (prefix weights), beside predictions by the causal "
        "slope and curvature. Here every token has the weight of its whole rollout, beside predictions by the exact "
        "ones. Both have the same limit."
    )
    shown = table(f"ΔH(η) with sequence weights in {unit.name}", rows, columns)
    return tag("details", tag("summary", "The same with sequence weights"), shown, tag("p", note, class_="note"))


def _pair(unit: Unit, name: str, error: str | None = None):
    """The cell of a number and its standard error."""
    return lambda row: with_error(row.get(name), row.get(error or f"{name}_stderr"), unit)


def reliability(content: dict) -> Markup:
    """Can the measurements be believed: weights, k̂, verdict and its reason."""
    rows = content["measured"]
    unit = unit_for([row["delta"] for row in rows], NATS)
    columns = [
        ("η", "", lambda row: number(row["eta"], step_text(row["eta"]))),
        ("Weights", "verdict and why", _reasoned_verdict),
        ("ESS", "rollouts", lambda row: _count(row.get("ess"))),
        ("ESS", "of all", lambda row: percent(row.get("ess_fraction"))),
        ("ESS of w·T", "rollouts", lambda row: _count(row.get("ess_tokens"))),
        *[(f"k̂ of {label}", "", lambda row, k=key: _khat(row, k)) for key, label in KHATS.items()],
        ("ESS at the worst position", "of those that have it", lambda row: percent(row.get("worst_ess_fraction"))),
        ("Worst position", "token", lambda row: _count(row.get("worst_position"))),
        ("Mean weight", "expected 1", lambda row: _fixed(row.get("mean_weight"), 3)),
        ("Largest weight", "of the total", lambda row: percent(row.get("max_weight"), 2)),
        ("Smoothed ΔH", unit.name, lambda row: quantity(row.get("smoothed_delta"), unit, row["stderr"])),
    ]
    floor = content.get("noise_floor")
    noise = None
    if floor is not None:
        noise = tag("p", "Noise floor of the arithmetic: at most ", number(floor, plain(floor)), f" {NATS}.")
    note = "ESS is the effective sample size of the importance weights w."
    if any(row.get("weights") == "prefix" for row in rows):
        note += " w is a rollout's mean over positions of the weight that the tokens before one give it."
    if any(row.get("verdict") for row in rows):
        note = f"A verdict is about the weights alone: whether ΔH differs from 0 is for its error bar to say. {note}"
    if any(row.get("khat") for row in rows):
        note += " k̂ is the shape of the tail of what is named: above 1 it has no mean."
    if any(row.get("smoothed_delta") is not None for row in rows):
        note += " Smoothed ΔH has a fitted tail in place of the largest weights."
    return section(
        "reliability",
        "Can the measurement be trusted?",
        table("Importance weights at every η", rows, columns),
        tag("p", note, class_="note"),
        noise,
    )


def _fresh(fresh: dict | None, unit: Unit) -> Markup | None:
    if fresh is None:
        return None
    text = (
        f"Checked at η = {step_text(fresh['eta'])} against {fresh['n_sequences']:,} rollouts "
        f"({fresh['n_tokens']:,} tokens) drawn anew from the moved policy: ΔH = "
    )
    return tag(
        "p",
        text,
        with_error(fresh["delta"], fresh["stderr"], unit),
        ", fresh − measured = ",
        with_error(fresh["difference"], fresh["difference_stderr"], unit),
        f" ({unit.name}).",
    )


def _verdict(row: dict) -> Markup | None:
    verdict = row.get("verdict")
    if row.get("below_noise_floor"):
        return tag("span", "□ below noise", class_="verdict")
    if verdict is None:
        return None
    return tag("span", tag("span", SIGNS[verdict], aria_hidden="true"), f" {verdict}", class_=f"verdict {verdict}")


def _verdict_beside(row: dict) -> Markup | None:
    """The verdict, with the words that ΔH itself is not told apart from 0 where it is not."""
    verdict = _verdict(row)
    if verdict is None or row["delta"] is None or row["stderr"] is None or entry_told_apart(row, "delta"):
        return verdict
    return tag("div", verdict, " ", tag("small", NEAR), class_="words")


def _reasoned_verdict(row: dict) -> Markup | None:
    verdict = _verdict(row)
    why = "rounding of the arithmetic, not data" if row.get("below_noise_floor") else row.get("verdict_reason")
    return verdict and tag("div", verdict, " ", tag("small", why), class_="words")


def _steps(row: dict, content: dict) -> Markup:
    steps = row["eta"] / content["step_size"]
    return number(steps, step_text(float(f"{steps:.4g}")))


def _khat(row: dict, key: str) -> Markup | None:
    return _fixed((row.get("khat") or {}).get(key), 2)


def _fixed(value: float | None, decimals: int) -> Markup | None:
    return None if value is None else number(value, f"{value:.{decimals}f}".replace("-", "−"))


def _count(value: float | None) -> Markup | None:
    return None if value is None else number(value, f"{value:,.0f}")
