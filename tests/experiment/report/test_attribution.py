import pytest
from report_page import STEP, content, page


@pytest.mark.parametrize("name", ["by_position", "by_length", "by_layer", "by_kind"])
def test_every_contribution_is_on_the_page(name):
    rows = content()["attribution"][name]
    assert len(rows) == 3
    assert {row["contribution"] * STEP for row in rows} <= set(page().values("attribution"))
