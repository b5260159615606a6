import numpy as np
import pytest
from report_page import STEP, content, page


def test_the_figure_puts_every_measurement_where_its_number_is():
    run, found = content(), page()
    labels = list(found.all("text", within="changes"))

    def scale(labels, axis):
        """value of a position in per cent, from the labels of the axis"""
        at = [float(e["attrs"][axis].rstrip("%")) for e in labels]
        return np.polyfit(at, [float(e["text"].replace("−", "-")) for e in labels], 1)

    y_scale = scale([e for e in labels if e["attrs"]["x"] == "-8"], "y")
    x_scale = scale([e for e in labels if e["attrs"]["y"] == "100%"], "x")
    marks = [e for e in found.all("svg", within="changes") if any(a["tag"] == "g" for a in e["inside"])]
    by_shape = {}
    for shape in ("circle", "path"):
        inner = [e["inside"][-1] for e in found.all(shape, within="changes")]
        by_shape[shape] = [e["attrs"] for e in marks if any(e is i for i in inner) and "x" in e["attrs"]]
    x, y = ([float(a[axis].rstrip("%")) for a in by_shape["circle"]] for axis in "xy")
    np.testing.assert_allclose(np.polyval(x_scale, x), [m["eta"] / STEP for m in run["measured"]], atol=1e-3)
    np.testing.assert_allclose(np.polyval(y_scale, y), [1e3 * m["delta"] for m in run["measured"]], atol=2e-3)
    (fresh,) = by_shape["path"]
    assert np.polyval(y_scale, float(fresh["y"].rstrip("%"))) == pytest.approx(-22.8, abs=2e-3)


@pytest.mark.parametrize(
    ("change", "legend"),
    [
        ({"verdict": "unusable"}, "measured, unusable"),
        ({"verdict": "strained"}, "measured, strained"),
        ({"below_noise_floor": True}, "measured, below the noise floor"),
    ],
)
def test_a_doubtful_measurement_is_told_apart_by_word_and_shape(change, legend):
    run = content()
    run["measured"] = run["measured"][:3]
    run["measured"][0].update(change)
    found = page(run)
    assert legend in [e["text"] for e in found.all("li", within="changes")]
    assert legend not in [e["text"] for e in page(run | {"measured": run["measured"][1:]}).all("li")]
    (point,) = [e for e in found.all("g", class_="point") if e["text"].startswith(legend)]
    assert "at η = −1e-4" in point["text"]
