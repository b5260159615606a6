import pytest
from report_page import STEP, content, page


@pytest.mark.parametrize("name", ["by_position", "by_length", "by_lag", "by_layer", "by_kind"])
def test_every_contribution_is_on_the_page(name):
    rows = content()["attribution"][name]
    assert len(rows) == 3
    shown = {row["contribution"] * STEP for row in rows} | {row["stderr"] * STEP for row in rows if "stderr" in row}
    assert shown <= set(page().values("attribution"))


def test_the_parts_come_with_their_errors_and_the_two_that_cancel_as_one():
    found = page()
    parts = next(e["text"] for e in found.all("table", within="attribution"))
    assert "score + length correction−4.00 ± 0.44" in parts and "−3.60 ± 0.21" in parts and "−7.60 ± 0.50" in parts


def test_shares_without_error_bars_say_why():
    notes = " ".join(" ".join(e["text"] for e in page().all("p", within="attribution")).split())
    assert "The shares of parameters have none: one gradient gives them all" in notes
    assert "an error bar would cost a pass with tangents per layer" in notes


def test_the_horizon_is_beside_the_whole_with_what_it_leaves_out():
    horizon = content()["horizon"]
    names = ("value", "stderr", "left_out", "left_out_stderr")
    assert {horizon[name] * STEP for name in names} <= set(page().values("attribution"))
