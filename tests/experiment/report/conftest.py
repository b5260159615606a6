import pytest
from blank_figures import blank

from dentropy.experiment.report import tables


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Bars are drawn in no time here; what they would show is kept: (rows, unit, total, whether that is clear)."""
    calls = []

    def kept(rows, unit, total, *, clear):
        calls.append((rows, unit, total, clear))
        return blank()

    monkeypatch.setattr(tables, "bars", kept)
    return calls
