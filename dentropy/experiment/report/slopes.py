"""The section on the derivatives at η = 0: slopes, curvature, and how far they reach."""

from __future__ import annotations

from markupsafe import Markup

from dentropy.experiment.drawing import NATS
from dentropy.experiment.readings import curvatures_apart, entry_told_apart, part
from dentropy.experiment.report.numbers import Unit, eta, interval, number, plain, quantity, unit_for, with_error
from dentropy.experiment.report.tables import Table, reasons, table

PER_ETA = f"{NATS} per unit of η"
PARTS = {
    "pathwise": "Pathwise",
    "other_answers": "Other answers",
    "score": "= Score",
    "length_correction": "+ Length correction",
    "uncorrected": "Uncorrected",
}


def slopes(content: dict) -> dict:
    """The slope by every estimator, the curvature and how far they reach."""
    rows, found = content["slope"], content.get("curvature")
    unit = unit_for([part(row, name)[0] for row in rows for name in ("value", *PARTS)], PER_ETA)
    columns = [
        ("Estimator", "", lambda row: row["estimator"]),
        ("Slope", "± SE", lambda row: with_error(row["value"], row["stderr"], unit)),
        ("95% interval", "", lambda row: interval(row.get("interval"), unit, row["stderr"])),
        ("Jackknife SE", "", lambda row: _error(row.get("jackknife_stderr"), unit)),
        *[(title, "± SE", lambda row, n=name: with_error(*part(row, n), unit)) for name, title in PARTS.items()],
    ]
    return {
        "title": "Slope at η = 0" if found is None else "Slope and curvature at η = 0",
        "slopes": table(f"Slope in {unit.name}", rows, columns),
        "no_errors": reasons(rows),
        "curvature": found and _curvature(found),
        "no_curvature": content.get("no_curvature"),
        "trust": _trust(content.get("trust") or {}),
    }


def _curvature(found: dict) -> dict:
    """The causal one, with the exact one to fold away and a sentence where they part."""
    exact, caption = found.get("exact"), "Exact curvature, the second derivative of ΔH with sequence weights,"
    return {
        "table": _curvature_table("Curvature", found),
        "parts_have_errors": "part_stderrs" in found,
        "far": found["stderr"] is not None and not entry_told_apart(found),
        "no_errors": reasons([found]),
        "exact": exact and _curvature_table(caption, exact),
        "apart": exact and curvatures_apart(found),
    }


def _curvature_table(caption: str, found: dict) -> Table:
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


def _trust(trust: dict) -> tuple[Markup, Markup | None] | None:
    """η*, and up to where the linear prediction holds."""
    if trust.get("eta_star") is None:
        return None
    star = number(trust["eta_star"], plain(trust["eta_star"], trust.get("stderr")))
    return star, eta(trust.get("linear_until"))


def _error(stderr: float | None, unit: Unit) -> Markup | None:
    return quantity(stderr, unit, stderr)
