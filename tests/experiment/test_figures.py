from functools import cache

import numpy as np
import pytest

from dentropy.experiment import figures

STEP = 1e-6
S = 300
ETAS = (-1e-6, 0.5e-6, 1e-6, 2e-6)
FIGURES = figures.FIGURES  # the real ones, in whose place conftest.py puts blank ones
CHANGES, CONTRIBUTIONS, WEIGHTS = FIGURES
DECADES = (-1e-6, 1e-9, 1e-8, 1e-7, 1e-6)
QUANTILES = {"min": -3, "p05": -1.5, "p25": -0.6, "median": 0.0, "p75": 0.6, "p95": 1.5, "max": 3}


def run(etas=ETAS, *, slope=-3e3, uncorrected=1e3, stderr=2e-4, fresh=True):
    """(content of results.json, columns of rollouts.csv) of a made-up run: only what the figures read."""
    rng = np.random.default_rng(0)
    causal = rng.normal(slope / S, abs(slope) / S, S)
    columns = {"slope_causal": causal, "slope_uncorrected": rng.normal(uncorrected / S, 5 * abs(uncorrected) / S, S)}
    measured = []
    for k, eta in enumerate(etas):
        columns[f"delta_contribution_{k}"] = eta * causal + rng.normal(0, 1e-8, S)
        spread = abs(eta) / STEP
        measured.append(
            {
                "eta": eta,
                "delta": columns[f"delta_contribution_{k}"].sum(),
                "stderr": stderr,
                "below_noise_floor": False,
                "verdict": "reliable",
                "predicted_linear": eta * slope,
                "predicted_linear_stderr": stderr,
                "predicted_uncorrected": eta * uncorrected,
                "ess": S / (1 + spread),
                "ess_fraction": 1 / (1 + spread),
                "max_weight": 0.02 * spread,
                "log_weight_quantiles": {name: spread * value for name, value in QUANTILES.items()},
            }
        )
    content = {
        "step_size": STEP,
        "n_sequences": S,
        "curvature": None,
        "measured": measured,
        "slope": [
            {"estimator": "exact", "value": 0.0, "stderr": 0.0, "uncorrected": uncorrected},
            {"estimator": "causal", "value": slope, "stderr": stderr, "uncorrected": uncorrected},
        ],
        "fresh_check": {"eta": etas[-1], "delta": measured[-1]["delta"], "stderr": stderr} if fresh else None,
    }
    return content, columns


@cache
def drawn(name, etas=ETAS):
    """A figure of such a run, laid out, which takes longer than all else here: so once, and only looked at."""
    figure = FIGURES[name](*run(etas))
    figure.canvas.draw()
    return figure


def texts(figure):
    axes = figure.axes[0]
    return axes.get_title(loc="left"), axes.get_ylabel()


def test_lines_and_points_are_the_numbers_in_readable_units():
    content, figure = run()[0], drawn(CHANGES)
    title, label = texts(figure)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    for name, slope in (("uncorrected", 1.0), ("predicted ± 2 SE", -3.0)):  # 1e3 · η in units of 1e-3 nats
        x, y = lines[name].get_data()
        assert x[0] == -1 and x[-1] == 2 and 0 in x
        np.testing.assert_allclose(y, slope * x)
    points = next(c for c in axes.containers if c.get_label().startswith("measured"))
    np.testing.assert_allclose(points.lines[0].get_xdata(), [-1, 0.5, 1, 2])
    np.testing.assert_allclose(points.lines[0].get_ydata(), [1e3 * m["delta"] for m in content["measured"]])
    (bars,) = points.lines[2]
    np.testing.assert_allclose([np.ptp(segment[:, 1]) for segment in bars.get_segments()], 4 * 0.2)
    assert "10⁻³ nats per token" in label
    assert f"measured {1e3 * content['measured'][2]['delta']:.2f} ± 0.20".replace("-", "−") in title
    assert "At η = 1e-6: predicted −3.00 ± 0.20" in title and "uncorrected 1.00 (10⁻³ nats per token" in title


@pytest.mark.parametrize(
    "name, etas", [*((name, ETAS) for name in FIGURES), (CHANGES, (1e-9,)), (CHANGES, DECADES), (WEIGHTS, DECADES)]
)
def test_axes_carry_no_offset_and_everything_lies_in_the_frame(name, etas):
    figure = drawn(name, etas)
    whole = figure.bbox
    for axes in figure.axes:
        assert axes.xaxis.get_offset_text().get_text() == axes.yaxis.get_offset_text().get_text() == ""
        assert axes.yaxis.label.get_window_extent().height <= axes.bbox.height
        for text in (axes.xaxis.label, axes._left_title):
            assert whole.x0 <= text.get_window_extent().x0 and text.get_window_extent().x1 <= whole.x1
        box = axes.get_tightbbox()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1


@pytest.mark.parametrize("etas", [ETAS, (1e-9,), DECADES])
def test_error_bars_lie_in_the_frame(etas):
    content = run(etas)[0]
    low, high = drawn(CHANGES, etas).axes[0].get_ylim()
    for entry in content["measured"]:
        unit = 10.0 ** (-3 * np.floor(np.log10(max(abs(m["delta"]) for m in content["measured"])) / 3))
        assert low < (entry["delta"] - 2 * entry["stderr"]) * unit
        assert (entry["delta"] + 2 * entry["stderr"]) * unit < high


def test_an_unusable_measurement_far_away_does_not_flatten_the_others_and_is_counted():
    content, _ = run()
    content["measured"][0].update(delta=-0.4, verdict="unusable")
    (axes,) = figures.delta_entropy(content).axes
    assert np.ptp([1e3 * entry["delta"] for entry in content["measured"][1:]]) / np.ptp(axes.get_ylim()) > 0.3
    assert axes.get_xlabel().endswith("\n1 measured outside the frame")
    assert "outside" not in drawn(CHANGES).axes[0].get_xlabel()


def test_a_wild_uncorrected_slope_does_not_flatten_the_measurement():
    content, _ = run(uncorrected=4e5)
    (axes,) = figures.delta_entropy(content).axes
    values = [1e3 * entry["delta"] for entry in content["measured"]]
    assert np.ptp(values) / np.ptp(axes.get_ylim()) > 0.3
    assert "uncorrected (runs to 800 at 2 steps)" in axes.get_legend_handles_labels()[1]


def test_histograms_share_bins_and_hold_every_rollout():
    columns, figure = run()[1], drawn(CONTRIBUTIONS)
    bars = [axes.patches[0].get_data() for axes in figure.axes]
    assert len(bars) == 3 and all(np.array_equal(found.edges, bars[0].edges) for found in bars)
    assert [found.values.sum() for found in bars] == [S] * 3
    measured = columns["delta_contribution_2"]  # η = 1e-6, the step
    for axes, name in zip(figure.axes[:2], ("slope_uncorrected", "slope_causal"), strict=True):
        note = axes.get_title(loc="left").replace("−", "-")
        assert f"sum {1e-3 * columns[name].sum():.2f}" in note  # 1e-6 · sum in units of 1e-3 nats
        assert f"correlation with measured {np.corrcoef(columns[name], measured)[0, 1]:.2f}" in note


def test_weights_show_the_ess_and_name_the_worst():
    figure = drawn(WEIGHTS)
    title, _ = texts(figure)
    top, bottom = figure.axes
    np.testing.assert_allclose(bottom.get_lines()[0].get_xydata(), [[-1, 50], [0.5, 200 / 3], [1, 50], [2, 100 / 3]])
    assert "100 of 300 rollouts (ESS 33.3%)" in title and "4.0% of the total" in title
    assert bottom.get_ylim()[0] == 0


def test_counts_of_few_rollouts_are_on_a_linear_axis():
    content, columns = run()
    assert [axes.get_yscale() for axes in drawn(CONTRIBUTIONS).axes] == ["linear"] * 3
    many = {name: np.tile(values, 4) / 4 for name, values in columns.items()}
    assert [axes.get_yscale() for axes in figures.contributions(content, many).axes] == ["log"] * 3


def test_eta_over_decades_is_told_apart():
    """On the axis every η has room for itself, and lines go where their numbers are."""
    for name in (CHANGES, WEIGHTS):
        axes = drawn(name, DECADES).axes[-1]
        at = axes.transData.transform([(eta / STEP, 0) for eta in DECADES])[:, 0]
        assert np.diff(sorted(at)).min() > 0.05 * axes.bbox.width
    line = next(line for line in drawn(CHANGES, DECADES).axes[0].get_lines() if "predicted" in line.get_label())
    np.testing.assert_allclose(line.get_ydata(), -3.0 * line.get_xdata())
    assert drawn(WEIGHTS).axes[0].get_xscale() == "linear"


def test_runs_without_standard_errors_or_movement_are_drawn():
    no_errors, _ = run(stderr=None, fresh=False)
    still, columns = run(slope=-1e-30, uncorrected=0.0, fresh=False)
    for entry in still["measured"]:
        entry |= {"delta": 0.0, "stderr": 0.0}
    columns = {name: np.zeros(S) for name in columns}
    contributions = figures.contributions(still, columns)
    for figure in (figures.delta_entropy(no_errors), figures.delta_entropy(still), contributions):
        figure.set_layout_engine("none")
        figure.canvas.draw()
