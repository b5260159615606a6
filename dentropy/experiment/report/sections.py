"""What the sections of the report share."""

from __future__ import annotations

from dentropy.experiment.report.numbers import number, step_text
from dentropy.experiment.report.tags import Markup, tag

NATS = "nats per token"
PER_ETA = "nats per token per unit of η"


def section(name: str, title: str, *children: object) -> Markup | None:
    """A section under its heading, or None where all children are."""
    if all(child is None for child in children):
        return None
    return tag("section", tag("h2", title), *children, id=name, aria_label=title)


def reasons(rows: list[dict]) -> Markup | None:
    """Why there are no standard errors: each reason once."""
    reasons = {row["stderr_reason"]: None for row in rows if row.get("stderr_reason") is not None}
    return tag("p", f"No standard error (?): {'; '.join(reasons)}.", class_="note") if reasons else None


def digits(value: float | None, digits: int = 3) -> Markup | None:
    return None if value is None else number(value, f"{value:.{digits}g}".replace("-", "−"))


def eta(value: float | None) -> Markup | None:
    return None if value is None else number(value, step_text(float(f"{value:.3g}")))
