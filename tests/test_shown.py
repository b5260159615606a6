"""What objects look like in a session: short, with their numbers."""

import sys
from html import unescape

import pandas
import pytest
from runs import small_run

from dentropy import Direction


def test_reprs_are_short_and_hold_the_numbers():
    run = small_run()
    found = run.slopes["causal"]
    for thing in (run, run.base, run.batch, run.forecast, found, run.curvature, run.trust, run.changes[0].measured):
        assert repr(thing).startswith(f"<{type(thing).__name__}") and len(repr(thing)) < 500
        assert max(map(len, repr(thing).splitlines())) < 160
    error = f"{found.value:.3e} ± {found.stderr:.1e} nats per token per unit of η"
    assert error in repr(run) and f"causal slope {error}" in repr(found) and error in repr(run.forecast)
    rollouts = f"{len(run.batch)} rollouts of {run.batch.n_groups} prompts"
    assert rollouts in repr(run) and rollouts in repr(run.base) and rollouts in repr(run.batch)
    direction = Direction({"weight": run.batch.tokens[:6].float() + 1}, 1e-6)
    assert repr(direction) == "<Direction: 6 weights in 1 tensor, step_size 1e-06>"


def test_notebooks_get_a_small_table():
    run = small_run()
    html = unescape(run._repr_html_())
    assert len(html) < 3000 and html.count("<tr>") == 1 + len(run.changes)
    assert all(f"{c.measured.value:.3e} ± {c.measured.stderr:.1e}" in html for c in run.changes)
    assert run.base._repr_html_().count("<tr>") == 6


def test_pandas_gets_the_columns(monkeypatch):
    run = small_run()
    for thing in (run, run.base):
        expected = pandas.DataFrame(thing.columns())
        pandas.testing.assert_frame_equal(thing.to_pandas(), expected, check_exact=True)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install"):
        run.to_pandas()
