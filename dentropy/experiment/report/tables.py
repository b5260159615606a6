"""Tables of the report, and sums with their terms as bars; columns that nobody filled are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from dentropy.experiment.bars import Bar, bars
from dentropy.experiment.drawing import svg
from dentropy.experiment.report.numbers import MISSING, Unit, number, quantity, with_error

# (head, unit or note below it, cell of a row); a cell is text, Markup or None.
Column = tuple[str, str, Callable[[dict], object]]


@dataclass(frozen=True)
class Table:
    """What the template `table` shows: heads with what stands below them, and rows of cells, the first a heading."""

    caption: str
    heads: list[tuple[str, str]]
    rows: list[list[object]]


def table(caption: str, rows: list, columns: list[Column]) -> Table:
    """One row per entry."""
    cells = [[cell(row) for row in rows] for _, _, cell in columns]
    kept = [index for index, column in enumerate(cells) if any(cell is not None for cell in column)]
    heads = [columns[index][:2] for index in kept]
    body = [[MISSING if cells[i][n] is None else cells[i][n] for i in kept] for n in range(len(rows))]
    return Table(caption, heads, body)


@dataclass(frozen=True)
class Terms:
    """What the template `terms` shows: a picture of a sum's terms, and the same in numbers."""

    title: str
    picture: Markup
    numbers: Table


def terms(
    title: str,
    rows: list[Bar],
    unit: Unit,
    *,
    head: str,
    count: str | None = None,
    total_stderr: float | None = None,
    clear: bool = True,
) -> Terms | None:
    """`rows` and their sum, which is told apart from 0 where it is `clear`; None without rows."""
    if not rows:
        return None
    total = Bar("Sum", sum(row.value for row in rows if row.value is not None), total_stderr)
    columns: list[Column] = [
        (head, "", lambda row: row.name),
        ("ΔH", "± SE" if any(row.stderr is not None for row in rows) else "", lambda row: _amount(row, unit)),
        (count or "", "", lambda row: None if row.count is None else number(row.count)),
    ]
    picture = Markup(svg(bars(rows, unit, total, clear=clear), f"{title} {rows}"))
    return Terms(title, picture, table(f"{title}, in {unit.name}", [*rows, total], columns))


def _amount(row: Bar, unit: Unit) -> Markup | None:
    return quantity(row.value, unit) if row.stderr is None else with_error(row.value, row.stderr, unit)


def reasons(rows: list[dict]) -> str | None:
    """Why there are no standard errors: each reason once."""
    found = {row["stderr_reason"]: None for row in rows if row.get("stderr_reason") is not None}
    return "; ".join(found) or None
