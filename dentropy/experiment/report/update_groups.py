"""The section on groups of the update's tokens: what each adds to the predicted change, and the update without it."""

from __future__ import annotations

from dentropy.experiment.drawing import change_unit
from dentropy.experiment.report.answer import times
from dentropy.experiment.report.numbers import Unit, interval, number, with_error
from dentropy.experiment.report.tables import reasons, table


def update_groups(content: dict) -> dict | None:
    """The groups that were asked for; None for a run without."""
    found, step, unit = content.get("update_groups"), content["step_size"], change_unit(content)
    if not found:
        return None
    columns = [
        ("Tokens of the update", "", lambda row: row["name"]),
        ("Number", "", lambda row: number(row["tokens"])),
        ("They add to ΔH", "± SE", lambda row: _change(row["share"], step, unit)),
        ("95% interval", "", lambda row: _ends(row["share"], step, unit)),
        ("ΔH without them", "± SE", lambda row: _change(row["rest"], step, unit)),
        ("95% interval", "", lambda row: _ends(row["rest"], step, unit)),
    ]
    parts = [row[name] for row in found for name in ("share", "rest") if row[name] is not None]
    return {
        "title": "Which kinds of the update's tokens",
        "table": table(f"Predicted changes in {unit.name}", found, columns),
        "no_errors": reasons(parts),
        "of_adam": (content.get("update_attribution") or {}).get("optimizer") in ("adam", "adamw"),
    }


def _change(part: dict | None, step: float, unit: Unit):
    return part and with_error(times(part["value"], step), times(part["stderr"], abs(step)), unit)


def _ends(part: dict | None, step: float, unit: Unit):
    if part is None or part["interval"] is None:
        return None
    return interval([times(end, step) for end in part["interval"]], unit, times(part["stderr"], abs(step)))
