"""The section on where the predicted change comes from."""

from __future__ import annotations

from dentropy.experiment.report.answer import causal
from dentropy.experiment.report.numbers import unit_for
from dentropy.experiment.report.sections import NATS, section
from dentropy.experiment.report.tables import bars
from dentropy.experiment.report.tags import Markup, tag


def attribution(content: dict) -> Markup | None:
    """Where the predicted change comes from: parts, kinds, layers, positions, lengths."""
    step, slope = content["step_size"], causal(content)
    found = content.get("attribution") or {}
    parts = [
        (label, _times(slope[name], step), None)
        for name, label in (
            ("pathwise", "pathwise: same contexts"),
            ("score", "score: other answers"),
            ("length_correction", "length correction"),
        )
    ]
    groups = [("What the slope is made of", "Part", None, parts)]
    for key, title, head in (("by_kind", "By kind of parameter", "Kind"), ("by_layer", "By layer", "Layer")):
        rows = [(row["name"], row["contribution"] * step, None) for row in found.get(key) or []]
        groups.append((title, head, None, rows))
    for key, title, count in (
        ("by_position", "By position in the answer", "tokens"),
        ("by_length", "By length of the answer (tokens)", "rollouts"),
    ):
        rows = [(_range(row), row["contribution"] * step, row[count]) for row in found.get(key) or []]
        groups.append((title, title.split()[1].capitalize(), count.capitalize(), rows))
    drawn = [
        bars(title, rows, unit_for([value for _, value, _ in rows], NATS), head=head, count=count)
        for title, head, count, rows in groups
        if rows
    ]
    note = (
        "What each adds to the predicted change of the update itself. Every list adds up to the whole; that by length "
        "to the exact slope's prediction, which alone can be split by length."
    )
    return section(
        "attribution", "Where it comes from", tag("p", note, class_="note"), tag("div", drawn, class_="grid")
    )


def _range(row: dict) -> str:
    return f"{row['first']:,}" if row["first"] == row["last"] else f"{row['first']:,} to {row['last']:,}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
