"""How pictures are drawn: one size, one set of words and colours, axes to read; a file or a part of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

import numpy as np

from dentropy.experiment.report.numbers import Unit, unit_for

NATS = "nats per token"
# Okabe and Ito's colours, which stay apart for colour-blind readers, the darker of two where it is thin. In a page they
# are the style sheet's, which has others for dark screens under these names.
COLOURS = {
    "paper": "#ffffff",
    "ink": "#000000",
    "muted": "#6a7178",
    "rule": "#d8dbde",
    "predicted": "#0072b2",
    "uncorrected": "#c24e00",
    "fresh": "#00795a",
    "lowers": "#1f8a80",
    "raises": "#a8722a",
    "unclear": "#b4b9be",
}
WORDS = {
    "uncorrected": "uncorrected",
    "predicted": "predicted ± 2 SE",
    "quadratic": "predicted, with curvature",
    "measured": "measured ± 2 SE",
    "strained": "measured, strained",
    "unusable": "measured, unusable",
    "noise": "measured, below the noise floor",
    "fresh": "fresh rollouts ± 2 SE",
}
# As wide as a column of text: in it, and on a phone, letters keep a readable size.
WIDTH = 5.6
# Values whose sizes differ by more get a scale that is logarithmic away from 0.
MANY = 30.0


def change_unit(content: dict) -> Unit:
    """The unit of every ΔH of a run, whole or in parts."""
    return unit_for([entry["delta"] for entry in content["measured"]], NATS)


def canvas(rows: int = 1, *, height: float, sharey: bool = False):
    """A figure of its own, outside pyplot's global state, with `rows` axes one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, sharey=sharey, squeeze=False)[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9)
    return figure, axes


def legend_below(figure, axes, columns: int) -> None:
    """The words for what `axes` show, where they hide nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns, frameon=False, fontsize=9)


def readable_scale(axis, values: Iterable[float]) -> float | None:
    """Makes `axis` logarithmic away from 0 where the sizes of `values` span decades; returns from which size on."""
    sizes = np.abs([value for value in values if value])
    if not sizes.size or sizes.max() <= MANY * sizes.min():
        return None
    logarithmic_from(axis, float(sizes.min()))
    return float(sizes.min())


def logarithmic_from(axis, size: float) -> None:
    """Makes `axis` logarithmic from `size` on to either side of 0, and linear between, where only 0 has a label."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("symlog", linthresh=size)
    axis.set_major_formatter(lambda value, _: "" if 0 < abs(value) < size * (1 - 1e-9) else signed(f"{value:g}"))


def svg(figure, name: str) -> str:
    """The figure for a page, letters as text and colours by name; `name` keeps its ids apart from other figures'."""
    from matplotlib import rc_context

    if figure.get_layout_engine() is not None:  # once: to save is to lay out twice
        figure.get_layout_engine().execute(figure)
    text = io.StringIO()
    no_engine = {"figure.autolayout": False, "figure.constrained_layout.use": False}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name} | no_engine):
        figure.set_layout_engine(None)  # with any, and "none" is one, to save is to draw twice
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # A style for all of the page, and ids that every figure has.
    drawn = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", drawn, count=1, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[\w.]+"', "<g", drawn)
    for colour, code in COLOURS.items():
        drawn = drawn.replace(f": {code}", f": var(--{colour})")
    return drawn


def signed(text: str) -> str:
    """The text with real minus signs."""
    return text.replace("-", "−")
