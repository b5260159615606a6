"""ΔH against η, as the page shows it: matplotlib's SVG of delta_entropy.png's figure."""

import re

import numpy as np
import pytest
from report_page import STEP, content, page

from dentropy.experiment import figures


def places(text, shape):
    """[(x, y)] of the marks whose path is like `shape`, in the drawing's units."""
    names = re.findall(rf'<path id="(\w+)" d="{shape}', text)
    found = re.findall(rf'<use xlink:href="#(?:{"|".join(names)})" x="([-\d.]+)" y="([-\d.]+)"', text)
    return np.array(found, dtype=float)  # those of the legend last


def scales(text):
    """The scales of both axes from the labels beside them: [value per place] as polynomials."""
    form = r'style="[^"]*text-anchor: (\w+)" x="([-\d.]+)" y="([-\d.]+)"[^>]*>([−\d.]+)</text>'
    labels = [(anchor, float(x), float(y), float(v.replace("−", "-"))) for anchor, x, y, v in re.findall(form, text)]
    across = [(x, value) for anchor, x, _, value in labels if anchor == "middle"]
    up = [(y, value) for anchor, _, y, value in labels if anchor == "end"]
    return (np.polyfit(*np.transpose(axis), 1) for axis in (across, up))


def test_the_figure_puts_every_measurement_where_its_number_is():
    run = content()
    found = page(run, pictures={"delta_entropy.png": figures.delta_entropy(run)})
    (drawing,) = found.all("div", class_="drawing", within="changes")
    text = found.source[found.source.index("<svg") : found.source.index("</svg>")]
    x_scale, y_scale = scales(text)
    points = places(text, r"M 0 2\.5")[:4]  # circles of 5 points
    below = y_scale[0] * 3.42  # labels stand so many points below the middle of their tick
    np.testing.assert_allclose(np.polyval(x_scale, points[:, 0]), [m["eta"] / STEP for m in run["measured"]], atol=2e-3)
    np.testing.assert_allclose(
        np.polyval(y_scale, points[:, 1]) + below, [1e3 * m["delta"] for m in run["measured"]], atol=0.02
    )
    assert "text" in {e["tag"] for e in found.elements if drawing in e["inside"]}


@pytest.mark.parametrize(
    ("change", "legend", "marker"),
    [
        ({"verdict": "unusable"}, "measured, unusable", "x"),
        ({"verdict": "strained"}, "measured, strained", "o"),
        ({"below_noise_floor": True}, "measured, below the noise floor", "s"),
    ],
)
def test_a_doubtful_measurement_is_told_apart_by_word_and_shape(change, legend, marker):
    run = content()
    run["measured"] = run["measured"][:3]
    run["measured"][0].update(change)
    (axes,) = figures.delta_entropy(run).axes
    points = {each.get_label(): each.lines[0] for each in axes.containers}
    assert set(points) == {"measured ± 2 SE", legend, "fresh rollouts ± 2 SE"}
    assert points[legend].get_marker() == marker and list(points[legend].get_xdata()) == [-1]
    assert points[legend].get_markerfacecolor() != points["measured ± 2 SE"].get_markerfacecolor()
    (axes,) = figures.delta_entropy(run | {"measured": run["measured"][1:]}).axes
    assert legend not in [each.get_label() for each in axes.containers]


def test_measurements_that_are_not_finite_are_left_out():
    run = content()
    run["measured"][0].update(delta=None, stderr=None, predicted_linear=None)
    (axes,) = figures.delta_entropy(run).axes
    assert [len(each.lines[0].get_xdata()) for each in axes.containers] == [2, 1, 1]
