"""The section on what the step buys and costs: one table at the update itself, one with every η."""

from __future__ import annotations

from markupsafe import Markup

from dentropy.experiment.drawing import NATS, change_unit
from dentropy.experiment.report.numbers import Unit, interval, number, plain, step_text, unit_for, with_error
from dentropy.experiment.report.tables import Table, table
from dentropy.experiment.trade import at, divergence_at


def forecast(content: dict) -> dict | None:
    """Entropy, reward, length, pass@k and KL divergence; None for runs of before."""
    found = content.get("forecast")
    if found is None:
        return None
    rows, reasons = _rows(content), found["reasons"]
    return {
        "title": "What the step buys and costs",
        "at_step": _at_the_step(rows, content["step_size"]),
        "at_etas": _at_every_eta(rows, content["measured"]),
        "missing": "; ".join(f"{name.replace('_', ' ')}: {reason}" for name, reason in reasons.items()),
    }


def _rows(content: dict) -> list[dict]:
    """What there is: its name, the unit that all its changes have, its entry, and how that is read at one η."""
    found = content["forecast"]
    rows = [
        ("Reward", "", found["reward"], at),
        ("Entropy", NATS, found["entropy"], at),
        ("Length", "tokens per rollout", found["length"], at),
        *[(f"pass@{entry['k']}", "", entry, at) for entry in found["pass_at_k"] or []],
        ("KL divergence", "nats per rollout", found["kl"]["sequence"], divergence_at),
        ("KL divergence", NATS, found["kl"]["token"], divergence_at),
    ]
    return [
        {"name": name, "unit_now": unit, "unit": _unit(content, name, unit, entry), "entry": entry, "read": read}
        for name, unit, entry, read in rows
        if entry is not None
    ]


def _unit(content: dict, name: str, unit: str, entry: dict) -> Unit:
    return change_unit(content) if name == "Entropy" else unit_for([row["value"] for row in entry["changes"]], unit)


def _at_the_step(rows: list[dict], step: float) -> Table:
    def now(row: dict) -> Markup | None:
        base = row["entry"].get("base")
        return None if base is None else Markup("{} {}").format(number(base, plain(base)), row["unit_now"])

    def change(measured: bool):
        def cell(row: dict) -> Markup | None:
            found = row["read"](row["entry"], step, measured)
            return found and with_error(found["value"], found["stderr"], row["unit"])

        return cell

    def ends(row: dict) -> Markup | None:
        found = row["read"](row["entry"], step, True)
        return found and interval(found["interval"], row["unit"], found["stderr"])

    columns = [
        ("", "", lambda row: row["name"]),
        ("Now", "", now),
        ("Predicted change", "± SE", change(False)),
        ("Measured change", "± SE", change(True)),
        ("95% interval", "of the measured", ends),
        ("Unit", "of the changes", lambda row: row["unit"].name.strip() or None),
    ]
    return table(f"At the update itself, η = {step_text(step)}", rows, columns)


def _at_every_eta(rows: list[dict], measured: list[dict]) -> Table:
    def column(found: dict):
        def cell(index: int) -> Markup | None:
            change = found["entry"]["changes"][index]
            return with_error(change["value"], change["stderr"], found["unit"])

        return found["name"], found["unit"].name, cell

    def eta(index: int) -> Markup:
        return number(measured[index]["eta"], step_text(measured[index]["eta"]))

    return table("Measured changes ± SE at every η", list(range(len(measured))), [("η", "", eta), *map(column, rows)])
