"""The section on the derivatives at η = 0: slopes, curvature, and how far they reach."""

from __future__ import annotations

from dentropy.experiment.readings import curvatures_apart, entry_told_apart, part
from dentropy.experiment.report.numbers import Unit, interval, number, plain, quantity, unit_for, with_error
from dentropy.experiment.report.sections import NATS, PER_ETA, eta, reasons, section
from dentropy.experiment.report.tables import table
from dentropy.experiment.report.tags import Markup, join, tag

PARTS = {
    "pathwise": "Pathwise",
    "other_answers": "Other answers",
    "score": "= Score",
    "length_correction": "+ Length correction",
    "uncorrected": "Uncorrected",
}


def slopes(content: dict) -> Markup:
    """The slope by every estimator, the curvature and how far they reach."""
    rows = content["slope"]
    unit = unit_for([part(row, name)[0] for row in rows for name in ("value", *PARTS)], PER_ETA)
    columns = [
        ("Estimator", "", lambda row: row["estimator"]),
        ("Slope", "± SE", lambda row: with_error(row["value"], row["stderr"], unit)),
        ("95% interval", "", lambda row: interval(row.get("interval"), unit, row["stderr"])),
        ("Jackknife SE", "", lambda row: _error(row.get("jackknife_stderr"), unit)),
        *[(title, "± SE", lambda row, n=name: with_error(*part(row, n), unit)) for name, title in PARTS.items()],
    ]
    note = (
        "Slope = pathwise + other answers. The latter is score + length correction, large numbers that nearly cancel, "
        "so that neither is to be read alone. The uncorrected value is the mixed slope without its length correction; "
        "the causal slope is the one that predicts."
    )
    return section(
        "slope",
        "Slope at η = 0" if content.get("curvature") is None else "Slope and curvature at η = 0",
        table(f"Slope in {unit.name}", rows, columns),
        tag("p", note, class_="note"),
        reasons(rows),
        _curvature(content),
        _trust(content.get("trust")),
    )


def _curvature(content: dict) -> Markup | None:
    found, reason = content.get("curvature"), content.get("no_curvature")
    if found is None:
        return None if reason is None else tag("p", f"No curvature: {reason}.", class_="note")
    note = "Curvature = score + cross + pathwise"
    note += "." if "part_stderrs" in found else ", parts without error bars of their own."
    if found["stderr"] is not None and not entry_told_apart(found):
        note += " It is not told apart from 0: η* may be far larger than what follows."
    return join([_curvature_table("Curvature", found), tag("p", note, class_="note"), reasons([found]), _exact(found)])


def _exact(causal: dict) -> Markup | None:
    """The other form, folded away, and a sentence where it says something else."""
    exact, apart = causal.get("exact"), curvatures_apart(causal)
    if exact is None:
        return None
    shown = _curvature_table("Exact curvature, the second derivative of ΔH with sequence weights,", exact)
    folded = tag("details", tag("summary", "The same by the exact curvature"), shown)
    return join([apart and tag("p", f"{apart}."), folded])


def _curvature_table(caption: str, found: dict) -> Markup:
    parts, errors = ("score", "cross", "pathwise"), found.get("part_stderrs") or {}
    unit = unit_for([found[name] for name in ("value", *parts)], f"{NATS} per unit of η²")

    def of_part(name: str):
        if name in errors:
            return lambda row: with_error(row[name], errors[name], unit)
        return lambda row: quantity(row[name], unit, row["stderr"])

    columns = [
        ("Curvature", "± SE", lambda row: with_error(row["value"], row["stderr"], unit)),
        ("95% interval", "", lambda row: interval(row.get("interval"), unit, row["stderr"])),
        ("Jackknife SE", "", lambda row: _error(row.get("jackknife_stderr"), unit)),
        *[(name.capitalize(), "± SE" if name in errors else "", of_part(name)) for name in parts],
        ("Differences over", "± η", lambda row: eta(row.get("step"))),
        ("Causal − exact", "± SE", lambda row: with_error(row.get("difference"), row.get("difference_stderr"), unit)),
    ]
    return table(f"{caption} in {unit.name}", [found], columns)


def _trust(trust: dict | None) -> Markup | None:
    if trust is None or trust.get("eta_star") is None:
        return None
    star = number(trust["eta_star"], plain(trust["eta_star"], trust.get("stderr")))
    reach = eta(trust.get("linear_until"))
    return tag(
        "p",
        "The linear and the quadratic term are equal at η* = ",
        star,
        reach and ["; up to η = ", reach, " the linear prediction is within 10% of the quadratic one"],
        ".",
    )


def _error(stderr: float | None, unit: Unit) -> Markup | None:
    return quantity(stderr, unit, stderr)
