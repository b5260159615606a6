"""The page is read back with html.parser."""

import re

import pytest
from report_page import HOSTILE, content, headings, hostile, page, rollouts
from runs import small_run

from dentropy.experiment.figures import FIGURES, delta_entropy
from dentropy.experiment.report.page import html

VISIBLE = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b")


def test_the_page_is_whole_and_asks_for_nothing():
    run, columns = content(), small_run().columns()
    found = page(run, pictures={name: draw(run, columns) for name, draw in FIGURES.items()})
    assert len(found.all("svg")) == 9
    tags = {e["tag"] for e in found.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    ids = [e["attrs"]["id"] for e in found.elements if "id" in e["attrs"]]
    assert len(set(ids)) == len(ids)
    for element in found.elements:
        assert "src" not in element["attrs"]
        assert not any(name.startswith("on") for name in element["attrs"])
        for name in ("href", "xlink:href"):
            assert element["attrs"].get(name, "#changes").removeprefix("#") in ids
    (style,) = found.all("style")
    assert not re.search(r"url\(|@import|</", style["text"])
    (policy,) = [e for e in found.all("meta") if e["attrs"].get("http-equiv") == "Content-Security-Policy"]
    assert policy["attrs"]["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert [e["tag"] for e in found.elements].count("h1") == 1


def test_text_from_outside_is_text():
    warned = content()
    warned["audit"]["warnings"] = ["one"]
    plain, tried = page(warned), page(*hostile(content(), rollouts()))
    assert {e["tag"] for e in tried.elements} == {e["tag"] for e in plain.elements}
    known = {name for e in plain.elements for name in e["attrs"]}
    assert {name for e in tried.elements for name in e["attrs"]} == known
    assert tried.text.count(VISIBLE) >= 12  # each place once, and the token in the list of largest ones


def test_the_head_has_prediction_measurement_and_what_an_uncorrected_loop_reports():
    terms = page().all("dl", class_="comparison")[0]["text"]
    assert "Predicted before the step−0.0076 ± 0.0005 nats per token" in terms
    assert "Measured by importance sampling−0.0066 ± 0.0006 nats per token" in terms
    assert "without the length correction reports−0.031 ± 0.003 nats per token" in terms


def test_what_a_run_does_not_have_is_left_out():
    run = content()
    new = {"interval", "jackknife_stderr", "warnings", "khat", "smoothed_delta", "below_noise_floor", "verdict"}
    new |= {"verdict_reason", "predicted_quadratic", "predicted_quadratic_stderr"}
    new |= {"prediction_error", "prediction_error_stderr"}
    new |= {"sequence", "weights", "worst_position", "worst_ess_fraction"}
    for entry in [*run["slope"], *run["measured"]]:
        for name in new & set(entry):
            del entry[name]
    for name in (
        "curvature",
        "trust",
        "noise_floor",
        "attribution",
        "horizon",
        "forecast",
        "fresh_check",
        "not_finite",
        "provenance",
    ):
        del run[name]
    found = page(run, [])
    assert headings(page()) == [
        "What the step buys and costs",
        "Change of entropy",
        "Can the measurement be trusted?",
        "Slope and curvature at η = 0",
        "Where it comes from",
        "Rollouts, token by token",
        "Audit and warnings",
        "How it was run",
    ]
    kept = [h for h in headings(page()) if not h.startswith(("Rollouts", "What the step"))]
    assert headings(found) == [h.replace("Slope and curvature", "Slope") for h in kept]
    for word in (
        "Curvature",
        "curvature",
        "η*",
        "k̂ of",
        "verdict",
        "Noise floor",
        "By layer",
        "interval",
        "drawn anew",
    ):
        assert word in page().text and word not in found.text
    assert "None" not in found.text and "nan" not in found.text


@pytest.mark.parametrize("name", ["curvature", "trust", "noise_floor", "attribution", "fresh_check"])
def test_none_is_the_same_as_absent(name):
    without = content()
    del without[name]
    assert html(content() | {name: None}, []) == html(without, [])
    assert html(without, []) != html(content(), [])


def _nothing_measured(run):
    for entry in run["measured"]:
        entry.update(delta=None, stderr=None, interval=None, smoothed_delta=None, predicted_linear=None)
    run["slope"][0].update(value=None, stderr=None, interval=None)
    run["fresh_check"] = None


def _nothing_happens(run):
    for entry in [*run["measured"], *run["slope"], run["fresh_check"]]:
        for name, value in entry.items():
            if isinstance(value, float) and name != "eta":
                entry[name] = 0.0


def _one_eta(run):
    run["measured"] = [run["measured"][0]]


@pytest.mark.parametrize("change", [_nothing_measured, _nothing_happens, _one_eta])
def test_poor_runs_have_a_page_too(change):
    run = content()
    change(run)
    found = page(run, pictures={"delta_entropy.png": delta_entropy(run)})
    assert len(headings(found)) == 8 and "nan" not in found.text and "None" not in found.text
    assert bool(found.all("figure", within="changes")) == (change is not _nothing_measured)
    for element in found.elements:
        assert not any(re.search(r"\b(nan|inf)\b", str(value)) for value in element["attrs"].values())


def test_what_cannot_be_encoded_is_shown_by_its_code():
    run = content()
    run["source"] = {"policy": "/data/\udcff"}  # an undecodable file name
    text = html(run, [])
    text.encode("utf-8")
    assert "/data/\\udcff" in text
