import numpy as np
import pytest
from report_page import page


@pytest.mark.parametrize(
    ("within", "caption", "unit", "count"),
    [
        ("changes", "ΔH(η) in 10⁻³ nats per token", 1e-3, 44),
        ("slope", "Slope in nats per token per unit of η", 1.0, 27),
    ],
)
def test_a_rounded_number_is_the_number_in_the_unit_of_its_table(within, caption, unit, count):
    found = page()
    assert found.all("caption", within=within)[0]["text"] == caption
    (table, *_) = found.all("table", within=within)
    steps = {"−1", "0.5", "1", "4"}
    cells = [e for e in found.all("td") if table in e["inside"] and e["text"] not in steps]
    shown = [e for e in found.all("data") if any(cell in e["inside"] for cell in cells)]
    for element in shown:
        text = element["text"].replace("−", "-")
        last = 10.0 ** -len(text.partition(".")[2])
        assert abs(float(text) * unit - float(element["attrs"]["value"])) <= 0.501 * last * unit
    assert len(shown) == count


def test_bars_are_as_long_as_their_numbers_and_add_up():
    found = page()
    (table,) = [t for t in found.all("table", class_="bars") if t["text"].startswith("By layer")]
    drawn = [e["attrs"] for e in found.all("rect") if table in e["inside"]]
    widths = np.array([float(a["width"].rstrip("%")) for a in drawn])
    np.testing.assert_allclose(widths / widths[1], np.abs([-90.0, 24.5, -10.5]) / 24.5, rtol=1e-3)
    assert [a["class"] for a in drawn] == ["lowers", "raises", "lowers"]
    right = [float(a["x"].rstrip("%")) + w for a, w in zip(drawn, widths, strict=True)]
    assert right[0] == pytest.approx(right[2], abs=2e-3) == float(drawn[1]["x"].rstrip("%"))  # the common zero
    assert "Sum−7.60" in table["text"]
