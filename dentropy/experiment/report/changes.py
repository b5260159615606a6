"""The sections on ΔH: predicted and measured at every η, and whether the measurements can be believed."""

from __future__ import annotations

from markupsafe import Markup

from dentropy.experiment.drawing import change_unit
from dentropy.experiment.readings import disagreement, entry_told_apart, forms_apart, part
from dentropy.experiment.report.answer import causal, times
from dentropy.experiment.report.numbers import Unit, interval, number, percent, plain, quantity, step_text, with_error
from dentropy.experiment.report.tables import Table, reasons, table

SIGNS = {"reliable": "●", "strained": "◐", "unusable": "✕"}
NEAR = "ΔH not told apart from 0"
BESIDE = '<div class="words">{} <small>{}</small></div>'
KHATS = {"w": "w", "wT": "w·T", "wH": "w·H"}


def changes(content: dict) -> dict:
    """Predicted and measured ΔH at every η, with either weights and from fresh rollouts."""
    rows, unit = content["measured"], change_unit(content)

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
    return {
        "title": "Change of entropy",
        "drawn": any(row["delta"] is not None for row in rows),
        "table": table(f"ΔH(η) in {unit.name}", rows, columns),
        "apart": [apart for apart in (disagreement(rows), forms_apart(rows)) if apart],
        "no_errors": reasons(rows),
        "sequence": _sequence(content, unit),
        "fresh": _fresh(content.get("fresh_check"), unit),
    }


def _sequence(content: dict, unit: Unit) -> Table | None:
    """The same with sequence weights; None for a run that measured with these alone."""
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
    return table(f"ΔH(η) with sequence weights in {unit.name}", rows, columns)


def _pair(unit: Unit, name: str, error: str | None = None):
    """The cell of a number and its standard error."""
    return lambda row: with_error(row.get(name), row.get(error or f"{name}_stderr"), unit)


def reliability(content: dict) -> dict:
    """Can the measurements be believed: weights, k̂, verdict and its reason."""
    rows, unit = content["measured"], change_unit(content)
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
    return {
        "title": "Can the measurement be trusted?",
        "table": table("Importance weights at every η", rows, columns),
        "prefix": any(row.get("weights") == "prefix" for row in rows),
        "verdicts": any(row.get("verdict") for row in rows),
        "khats": any(row.get("khat") for row in rows),
        "smoothed": any(row.get("smoothed_delta") is not None for row in rows),
        "noise_floor": None if floor is None else number(floor, plain(floor)),
    }


def _fresh(fresh: dict | None, unit: Unit) -> dict | None:
    if fresh is None:
        return None
    return {
        "eta": step_text(fresh["eta"]),
        "rollouts": f"{fresh['n_sequences']:,}",
        "tokens": f"{fresh['n_tokens']:,}",
        "delta": with_error(fresh["delta"], fresh["stderr"], unit),
        "difference": with_error(fresh["difference"], fresh["difference_stderr"], unit),
        "unit": unit.name,
    }


def _verdict(row: dict) -> Markup | None:
    verdict = row.get("verdict")
    if row.get("below_noise_floor"):
        return Markup('<span class="verdict">□ below noise</span>')
    if verdict is None:
        return None
    form = '<span class="verdict {0}"><span aria-hidden="true">{1}</span> {0}</span>'
    return Markup(form).format(verdict, SIGNS[verdict])


def _verdict_beside(row: dict) -> Markup | None:
    """The verdict, with the words that ΔH itself is not told apart from 0 where it is not."""
    verdict = _verdict(row)
    if verdict is None or row["delta"] is None or row["stderr"] is None or entry_told_apart(row, "delta"):
        return verdict
    return Markup(BESIDE).format(verdict, NEAR)


def _reasoned_verdict(row: dict) -> Markup | None:
    verdict = _verdict(row)
    why = "rounding of the arithmetic, not data" if row.get("below_noise_floor") else row.get("verdict_reason")
    return verdict and Markup(BESIDE).format(verdict, why)


def _steps(row: dict, content: dict) -> Markup:
    steps = row["eta"] / content["step_size"]
    return number(steps, step_text(float(f"{steps:.4g}")))


def _khat(row: dict, key: str) -> Markup | None:
    return _fixed((row.get("khat") or {}).get(key), 2)


def _fixed(value: float | None, decimals: int) -> Markup | None:
    return None if value is None else number(value, f"{value:.{decimals}f}".replace("-", "−"))


def _count(value: float | None) -> Markup | None:
    return None if value is None else number(value, f"{value:,.0f}")
