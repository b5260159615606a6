"""Tables of the report: columns that nobody filled are left out, wide ones scroll inside themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dentropy.experiment.readings import told_apart
from dentropy.experiment.report.numbers import MISSING, Unit, quantity, with_error
from dentropy.experiment.report.tags import Markup, tag

# (head, unit or note below it, cell of a row); a cell is text, Markup or None.
Column = tuple[str, str, Callable[[dict], object]]


def table(caption: str, rows: list[dict], columns: list[Column]) -> Markup:
    """One row per entry, the first column as its heading."""
    cells = [[cell(row) for row in rows] for _, _, cell in columns]
    kept = [index for index, column in enumerate(cells) if any(cell is not None for cell in column)]
    head = [
        tag("th", columns[index][0], tag("small", columns[index][1]) if columns[index][1] else None, scope="col")
        for index in kept
    ]
    body = [tag("tr", [_cell(cells[index][number], index) for index in kept]) for number in range(len(rows))]
    return scrolling(caption, tag("table", tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", body)))


def scrolling(label: str, content: Markup) -> Markup:
    """A box that scrolls sideways by itself, reachable by keyboard."""
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


@dataclass(frozen=True)
class Bar:
    """A row of `bars`: its value may have a standard error, and a count of what is in it."""

    name: str
    value: float | None
    stderr: float | None = None
    count: int | None = None


def bars(
    caption: str,
    rows: list[Bar],
    unit: Unit,
    *,
    head: str,
    count: str | None,
    total_stderr: float | None,
    clear: bool,
    total: bool = True,
) -> Markup:
    """Horizontal bars from a common zero, whiskers of 2 standard errors, and their sum below (`total`).

    Bars that are not told apart from 0 are grey, and so are all of them where their sum is not (`clear`).
    """
    values = [row.value for row in rows if row.value is not None]
    reach = [0.0, *(end for row in rows if row.value is not None for end in _ends(row))]
    low, width = min(reach), (max(reach) - min(reach)) or 1.0
    body = [
        tag(
            "tr",
            tag("th", row.name, scope="row"),
            tag("td", _bar(row, low, width, clear), class_="bar"),
            tag("td", MISSING if row.value is None else _amount(row.value, row.stderr, unit)),
            None if count is None else tag("td", f"{row.count:,}", class_="count"),
        )
        for row in rows
    ]
    heads = [
        tag("th", head, scope="col"),
        tag("td", class_="bar"),
        tag("th", "ΔH ± SE" if any(row.stderr is not None for row in rows) else "ΔH", scope="col"),
        None if count is None else tag("th", count, scope="col"),
    ]
    below = [
        tag("th", "Sum", scope="row"),
        tag("td", class_="bar"),
        tag("td", _amount(sum(values), total_stderr, unit)),
    ]
    return tag(
        "table",
        tag("caption", caption, " ", tag("small", f"in {unit.name}")),
        tag("thead", tag("tr", heads)),
        tag("tbody", body),
        tag("tfoot", tag("tr", below, None if count is None else tag("td"))) if total else None,
        class_="bars",
    )


def _cell(content: object, index: int) -> Markup:
    if index == 0:
        return tag("th", content, scope="row")
    return tag("td", MISSING if content is None else content)


def _ends(row: Bar) -> tuple[float, float]:
    """What a bar with its whisker reaches from and to."""
    half = 2 * (row.stderr or 0.0)
    return row.value - half, row.value + half


def _amount(value: float, stderr: float | None, unit: Unit) -> Markup:
    return quantity(value, unit) if stderr is None else with_error(value, stderr, unit)


def _bar(row: Bar, low: float, width: float, clear: bool) -> Markup:
    def at(value: float) -> str:
        return f"{100 * (value - low) / width:.3f}%"

    drawn = [tag("line", x1=at(0.0), x2=at(0.0), y1="0", y2="100%", class_="zero")]
    if row.value:
        kind = "raises" if row.value > 0 else "lowers"
        if not clear or (row.stderr is not None and not told_apart(row.value, row.stderr)):
            kind = "unclear"
        size = f"{100 * abs(row.value) / width:.3f}%"
        drawn.insert(0, tag("rect", x=at(min(row.value, 0.0)), width=size, y="15%", height="70%", class_=kind))
    if row.value is not None and row.stderr is not None:
        x1, x2 = map(at, _ends(row))
        drawn.append(tag("line", x1=x1, x2=x2, y1="50%", y2="50%", class_="whisker"))
    return tag("svg", drawn, width="100%", height="18", aria_hidden="true")
