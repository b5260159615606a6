"""The section on what the step buys and costs: one table at the update itself, one with every η."""

from __future__ import annotations

from dentropy.experiment.report.numbers import Unit, interval, number, plain, step_text, unit_for, with_error
from dentropy.experiment.report.sections import NATS, section
from dentropy.experiment.report.tables import table
from dentropy.experiment.report.tags import Markup, tag
from dentropy.experiment.trade import at, divergence_at


def forecast(content: dict) -> Markup | None:
    """Entropy, reward, length, pass@k and KL divergence; None for runs of before."""
    found = content.get("forecast")
    if found is None:
        return None
    quantities = _quantities(found)
    return section(
        "forecast",
        "What the step buys and costs",
        _at_the_step(quantities, content["step_size"]),
        _at_every_eta(quantities, content["measured"]),
        _reasons(found["reasons"]),
    )


def _quantities(found: dict) -> list[tuple[str, str, dict, bool]]:
    """(name, unit, entry, whether it is a divergence) of those that are there."""
    rows = [
        ("Reward", "", found["reward"], False),
        ("Entropy", NATS, found["entropy"], False),
        ("Length", "tokens per rollout", found["length"], False),
        *[(f"pass@{entry['k']}", "", entry, False) for entry in found["pass_at_k"] or []],
        ("KL divergence", "nats per rollout", found["kl"]["sequence"], True),
        ("KL divergence", NATS, found["kl"]["token"], True),
    ]
    return [row for row in rows if row[2] is not None]


def _at_the_step(quantities: list, step: float) -> Markup:
    rows = []
    for name, unit, entry, divergence in quantities:
        read = divergence_at if divergence else at
        rows.append(
            {
                "name": name,
                "unit": unit,
                "now": entry.get("base"),
                "predicted": read(entry, step, False),
                "measured": read(entry, step, True),
            }
        )

    def change(key: str):
        def cell(row: dict) -> Markup | None:
            return row[key] and with_error(row[key]["value"], row[key]["stderr"], Unit(1.0, row["unit"]))

        return cell

    columns = [
        ("", "", lambda row: [row["name"], " ", tag("small", row["unit"])] if row["unit"] else row["name"]),
        ("Now", "", lambda row: None if row["now"] is None else number(row["now"], plain(row["now"]))),
        ("Predicted change", "± SE", change("predicted")),
        ("Measured change", "± SE", change("measured")),
        ("95% interval", "of the measured", _interval),
    ]
    return table(f"At the update itself, η = {step_text(step)}", rows, columns)


def _interval(row: dict) -> Markup | None:
    found = row["measured"]
    return found and interval(found["interval"], Unit(1.0, row["unit"]), found["stderr"])


def _at_every_eta(quantities: list, measured: list[dict]) -> Markup:
    rows = [{"eta": entry["eta"], "index": index} for index, entry in enumerate(measured)]

    def column(name: str, unit: str, changes: list[dict]):
        scale = unit_for([change["value"] for change in changes], unit)

        def cell(row: dict) -> Markup | None:
            change = changes[row["index"]]
            return with_error(change["value"], change["stderr"], scale)

        return name, scale.name, cell

    columns = [
        ("η", "", lambda row: number(row["eta"], step_text(row["eta"]))),
        *[column(name, unit, entry["changes"]) for name, unit, entry, _ in quantities],
    ]
    return table("Measured changes ± SE at every η", rows, columns)


def _reasons(reasons: dict[str, str]) -> Markup | None:
    if not reasons:
        return None
    named = "; ".join(f"{name.replace('_', ' ')}: {reason}" for name, reason in reasons.items())
    return tag("p", f"Not here: {named}.", class_="note")
