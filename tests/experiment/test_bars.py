import io
from xml.etree import ElementTree

import numpy as np
from matplotlib.colors import to_hex

from dentropy.experiment.bars import Bar, bars
from dentropy.experiment.drawing import COLOURS, svg
from dentropy.experiment.report.numbers import Unit

MILLI = Unit(1e3, "10⁻³ nats per token")
HOSTILE = "<script>'$x$'</script>&amp;"


def test_bars_are_as_long_as_their_numbers_and_whiskers_reach_two_standard_errors():
    rows = [Bar("first", -9e-3, 6e-4, 3), Bar(HOSTILE, 2.45e-3, 5.5e-4), Bar("third", -1e-3, 8e-4), Bar("lost", None)]
    figure = bars(rows, MILLI, Bar("Sum", -7.55e-3, 1e-3), clear=True)
    (axes,) = figure.axes
    boxes = [box for container in axes.containers for box in getattr(container, "patches", [])]
    np.testing.assert_allclose([box.get_width() for box in boxes], [-9, 2.45, -1])
    assert {box.get_x() for box in boxes} == {0}
    assert [to_hex(box.get_facecolor()) for box in boxes] == [COLOURS[k] for k in ("lowers", "raises", "unclear")]
    segments = [c.get_segments()[0] for c in axes.collections]
    np.testing.assert_allclose([np.ptp(s[:, 0]) for s in segments], [4 * 0.6, 4 * 0.55, 4 * 0.8])
    said = [text.get_text() for text in axes.texts]
    assert said == ["−9.00 ± 0.60", "2.45 ± 0.55", "−1.00 ± 0.80", "not finite", "−7.6 ± 1.0"]

    drawn = svg(figure, "a")
    root = ElementTree.fromstring(drawn)
    names = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "first" in names and HOSTILE in names
    assert "<script" not in drawn and "<style" not in drawn and "<metadata" not in drawn
    assert not [colour for colour in COLOURS.values() if f": {colour}" in drawn] and "var(--lowers)" in drawn
    png = io.BytesIO()
    figure.savefig(png)
    assert png.getvalue().startswith(b"\x89PNG")


def test_two_figures_on_a_page_share_no_id():
    def ids(name):
        figure = bars([Bar("a", 1e-3, 1e-4)], MILLI, Bar("Sum", 1e-3), clear=True)
        return {e.get("id") for e in ElementTree.fromstring(svg(figure, name)).iter() if e.get("id")}

    assert ids("a") and not ids("a") & ids("b")
