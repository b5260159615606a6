"""Tables of the report: columns that nobody filled are left out, wide ones scroll inside themselves."""

from __future__ import annotations

from collections.abc import Callable

from dentropy.experiment.report.numbers import MISSING, Unit, quantity
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


def bars(
    caption: str, rows: list[tuple[str, float | None, int | None]], unit: Unit, *, head: str, count: str | None = None
) -> Markup:
    """(name, value, how many) as horizontal bars from a common zero, with their sum below."""
    values = [value for _, value, _ in rows if value is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    width = (high - low) or 1.0
    body = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", _bar(value, low, width), class_="bar"),
            tag("td", MISSING if value is None else quantity(value, unit)),
            None if count is None else tag("td", f"{many:,}", class_="count"),
        )
        for name, value, many in rows
    ]
    heads = [
        tag("th", head, scope="col"),
        tag("td", class_="bar"),
        tag("th", "ΔH", scope="col"),
        None if count is None else tag("th", count, scope="col"),
    ]
    total = [tag("th", "Sum", scope="row"), tag("td", class_="bar"), tag("td", quantity(sum(values), unit))]
    return tag(
        "table",
        tag("caption", caption, " ", tag("small", f"in {unit.name}")),
        tag("thead", tag("tr", heads)),
        tag("tbody", body),
        tag("tfoot", tag("tr", total, None if count is None else tag("td"))),
        class_="bars",
    )


def _cell(content: object, index: int) -> Markup:
    if index == 0:
        return tag("th", content, scope="row")
    return tag("td", MISSING if content is None else content)


def _bar(value: float | None, low: float, width: float) -> Markup:
    zero = f"{100 * -low / width:.3f}%"
    drawn = [tag("line", x1=zero, x2=zero, y1="0", y2="100%", class_="zero")]
    if value:
        start, size = 100 * (min(value, 0.0) - low) / width, 100 * abs(value) / width
        kind = "raises" if value > 0 else "lowers"
        drawn.insert(0, tag("rect", x=f"{start:.3f}%", width=f"{size:.3f}%", y="15%", height="70%", class_=kind))
    return tag("svg", drawn, width="100%", height="18", aria_hidden="true")
