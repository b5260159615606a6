"""A sum and its terms as horizontal bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dentropy.experiment.drawing import COLOURS, canvas
from dentropy.experiment.readings import told_apart
from dentropy.experiment.report.numbers import Unit, amount


@dataclass(frozen=True)
class Bar:
    """A term: its value may have a standard error, and a count of what is in it."""

    name: str
    value: float | None
    stderr: float | None = None
    count: int | None = None

    def kind(self, clear: bool) -> str:
        """What its colour says; it is grey where it, or the sum (not `clear`), is not told apart from 0."""
        if not clear or (self.stderr is not None and not told_apart(self.value, self.stderr)):
            return "unclear"
        return "raises" if self.value > 0 else "lowers"


def bars(rows: Sequence[Bar], unit: Unit, total: Bar, *, clear: bool):
    """Bars from a common zero with whiskers of 2 standard errors, names to the left and numbers to the right."""
    figure, (axes,) = canvas(height=0.6 + 0.27 * (len(rows) + 1))
    axes.axvline(0, color=COLOURS["muted"], lw=0.8)
    for place, row in enumerate(rows):
        if row.value is not None:
            axes.barh(place, row.value * unit.factor, height=0.7, color=COLOURS[row.kind(clear)])
            if row.stderr is not None:
                whisker = 2 * row.stderr * unit.factor
                axes.errorbar(row.value * unit.factor, place, xerr=whisker, color=COLOURS["ink"], lw=1)
    listed = [*rows, total]
    for place, row in enumerate(listed):
        weight = "bold" if row is total else "normal"
        beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
        axes.text(1.02, place, amount(row.value, row.stderr, unit), weight=weight, **beside)
    axes.set_yticks(range(len(listed)), [_short(row.name) for row in listed], parse_math=False)
    axes.get_yticklabels()[-1].set_weight("bold")
    axes.axhline(len(rows) - 0.5, color=COLOURS["rule"], lw=0.8)
    axes.set_ylim(len(rows) + 0.5, -0.6)
    axes.tick_params("y", length=0)
    axes.spines["left"].set_visible(False)
    axes.locator_params("x", nbins=5)
    axes.set_xlabel(f"ΔH ({unit.name})", fontsize=9)
    return figure


def _short(name: str, most: int = 28) -> str:
    """A name that leaves room for its bar: of a long one both ends are kept."""
    lines = name.split("\n")
    return "\n".join(x if len(x) <= most else f"{x[: most // 2 - 1]}…{x[-most // 2 :]}" for x in lines)
