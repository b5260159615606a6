"""Figures drawn in no time, for tests of other files of a run: drawing takes longer than a small run itself."""

from matplotlib.figure import Figure

from dentropy.experiment import figures
from dentropy.experiment.report import tables


def blank(*_, **__):
    return Figure(figsize=(1, 1))


def blank_figures(monkeypatch):
    """The figures of a run folder and the bars of its page; the page itself is written."""
    monkeypatch.setattr(figures, "FIGURES", dict.fromkeys(figures.FIGURES, blank))
    monkeypatch.setattr(tables, "bars", blank)
