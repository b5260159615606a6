import numpy as np
import pytest
from report_page import content, page


@pytest.mark.parametrize(
    ("within", "caption", "unit", "count"),
    [
        ("changes", "ΔH(η) in 10⁻³ nats per token", 1e-3, 48),
        ("slope", "Slope in nats per token per unit of η", 1.0, 45),
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


def drawn(found, caption):
    """Attributes of the bars and of the whiskers of a table."""
    (table,) = [t for t in found.all("table", class_="bars") if t["text"].startswith(caption)]
    inside = [e for e in found.elements if table in e["inside"]]
    whiskers = [e["attrs"] for e in inside if e["attrs"].get("class") == "whisker"]
    return [e["attrs"] for e in inside if e["tag"] == "rect"], whiskers


def test_whiskers_reach_two_standard_errors_and_what_is_not_told_apart_is_grey():
    bars, whiskers = drawn(page(), "By position")  # −90 ± 6, 24.5 ± 5.5, −10.5 ± 8
    assert [bar["class"] for bar in bars] == ["lowers", "raises", "unclear"]
    per_cent = float(bars[0]["width"].rstrip("%")) / 90
    reach = [float(w["x2"].rstrip("%")) - float(w["x1"].rstrip("%")) for w in whiskers]
    np.testing.assert_allclose(reach, 4 * np.array([6.0, 5.5, 8.0]) * per_cent, rtol=1e-3)
    assert not drawn(page(), "By layer")[1]


def test_no_part_is_sure_where_the_whole_is_not():
    run = content()
    run["slope"][0]["interval"] = [-160.0, 8.0]
    found = page(run)
    for caption in ("What the slope", "By layer", "By kind", "By position", "By distance"):
        assert {bar["class"] for bar in drawn(found, caption)[0]} == {"unclear"}, caption
    assert "lowers" in {bar["class"] for bar in drawn(found, "By length")[0]}  # of the exact slope
    said = "is not told apart from 0, so where it comes from is not known"
    assert said in found.text and said not in page().text
    run["slope"][0].update(interval=None, stderr=None)
    assert "has no error bar, so where it comes from" in page(run).text


def test_bars_are_as_long_as_their_numbers_and_add_up():
    found = page()
    (table,) = [t for t in found.all("table", class_="bars") if t["text"].startswith("By layer")]
    bars, _ = drawn(found, "By layer")
    widths = np.array([float(a["width"].rstrip("%")) for a in bars])
    np.testing.assert_allclose(widths / widths[1], np.abs([-90.0, 24.5, -10.5]) / 24.5, rtol=1e-3)
    assert [a["class"] for a in bars] == ["lowers", "raises", "lowers"]
    right = [float(a["x"].rstrip("%")) + w for a, w in zip(bars, widths, strict=True)]
    assert right[0] == pytest.approx(right[2], abs=2e-3) == float(bars[1]["x"].rstrip("%"))  # the common zero
    assert "Sum−7.60" in table["text"]
