import pytest
from report_page import content, page

from dentropy.experiment.report.attribution import attribution


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


def sums(run, drawn):
    """What the page draws of `run` as bars, by title."""
    drawn.clear()
    return dict(zip((found.title for found in attribution(run)["lists"]), drawn, strict=True))


def kinds(rows, unit, total, clear):
    return [row.kind(clear) for row in rows]


def test_what_is_not_told_apart_is_grey(drawn):
    found = sums(content(), drawn)
    assert kinds(*found["By position in the answer"]) == [
        "lowers",
        "raises",
        "unclear",
    ]  # −90 ± 6, 24.5 ± 5.5, −10.5 ± 8
    assert kinds(*found["By layer"]) == ["lowers", "raises", "lowers"]
    assert [row.stderr for row in found["By layer"][0]] == [None] * 3


def test_no_part_is_sure_where_the_whole_is_not(drawn):
    run = content()
    run["slope"][0]["interval"] = [-160.0, 8.0]
    found = sums(run, drawn)
    by_length = found.pop("By length of the answer (tokens)")
    assert len(found) == 5
    for title, shown in found.items():
        assert set(kinds(*shown)) == {"unclear"}, title
    assert "lowers" in kinds(*by_length)  # of the exact slope
    text, said = page(run).text, "is not told apart from 0, so where it comes from is not known"
    assert said in text and said not in page().text
    run["slope"][0].update(interval=None, stderr=None)
    assert "has no error bar, so where it comes from" in page(run).text


def test_every_change_is_in_one_unit(drawn):
    assert {unit.name for _, unit, _, _ in sums(content(), drawn).values()} == {"10⁻³ nats per token"}
    run = content()
    for entry in run["measured"]:
        entry["delta"] *= 100
    assert {unit.name for _, unit, _, _ in sums(run, drawn).values()} == {"nats per token"}


def test_the_terms_add_up_to_what_is_below_them(drawn):
    rows, _, total, _ = sums(content(), drawn)["By layer"]
    assert total.value == pytest.approx(-76e-4) == pytest.approx(sum(row.value for row in rows))
    (table,) = [t for t in page().all("table") if t["text"].strip().startswith("By layer")]
    assert "Sum−7.60" in table["text"]
