"""The report is read back with html.parser, and by Chromium where there is one."""

import copy
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from dentropy.experiment import report
from dentropy.experiment.report import numbers
from dentropy.experiment.report.answer import answer, ways
from dentropy.experiment.report.rollouts import SHOWN_TOKENS

STEP = 1e-4
HOSTILE = "<script>alert('x')</script>&amp;\" onmouseover=\"y\x00\x1b"
VISIBLE = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"br", "col", "meta"}


def content():
    """A made-up run with everything in it."""
    entries = [(-1e-4, 7.1e-3, 5.6e-4), (5e-5, -3.35e-3, 2.8e-4), (1e-4, -6.61e-3, 5.6e-4), (4e-4, -0.0246, 3.1e-3)]
    slope, curvature = -76.0, 4.1e4
    slopes = [
        ("causal", slope, 5.0, -36.0, -100.0, 60.0),
        ("exact", -68.2, 5.5, -36.0, -82.2, 50.0),
        ("mixed", -107.5, 46.9, -36.0, -121.5, 50.0),
    ]
    shares = [-90.0, 24.5, -10.5]
    return {
        "versions": {"dentropy": "0.1.0", "triton": None},
        "device": "cpu",
        "dtype": "float32",
        "source": {"policy": "/models/a"},
        "seeds": {"rollouts": 7},
        "n_sequences": 4096,
        "n_tokens": 36453,
        "n_groups": 512,
        "temperature": 1.0,
        "step_size": STEP,
        "prompts": "random",
        "base_entropy": 1.2,
        "base_entropy_stderr": 1.7e-3,
        "slope": [
            {
                "estimator": name,
                "value": value,
                "stderr": stderr,
                "stderr_reason": None,
                "interval": [value - 1.96 * stderr, value + 1.96 * stderr],
                "jackknife_stderr": 1.01 * stderr,
                "warnings": [],
                "pathwise": pathwise,
                "score": score,
                "length_correction": length,
                "uncorrected": -308.1,
            }
            for name, value, stderr, pathwise, score, length in slopes
        ],
        "curvature": {
            "value": curvature, "stderr": 1.9e4, "score": 7e4, "cross": -4.2e4, "pathwise": 1.3e4,
            "step": 2.5e-5,
        },
        "trust": {"eta_star": 3.7e-3, "linear_until": 3.7e-4},
        "measured": [
            {
                "eta": eta,
                "delta": delta,
                "stderr": stderr,
                "stderr_reason": None,
                "interval": [delta - 1.96 * stderr, delta + 1.96 * stderr],
                "predicted_linear": slope * eta,
                "predicted_linear_stderr": 5.0 * abs(eta),
                "predicted_uncorrected": -308.1 * eta,
                "predicted_quadratic": slope * eta + curvature * eta**2 / 2,
                "predicted_quadratic_stderr": 5.2 * abs(eta),
                "prediction_error": slope * eta - delta,
                "prediction_error_stderr": 2.1 * abs(eta),
                "ess": 3900.0 - k,
                "ess_fraction": (3900.0 - k) / 4096,
                "ess_tokens": 3000.0 - k,
                "max_weight": 1.2e-3,
                "mean_weight": 0.9991,
                "verdict": "strained" if eta == 4e-4 else "reliable",
                "verdict_reason": f"the reason of {k}",
                "khat": {"w": 0.31, "wT": 0.42 + k / 100, "wH": None},
                "smoothed_delta": delta * 1.01,
                "below_noise_floor": False,
            }
            for k, (eta, delta, stderr) in enumerate(entries)
        ],
        "noise_floor": 3e-7,
        "fresh_check": {
            "eta": 4e-4, "n_sequences": 4095, "n_tokens": 34088, "value": 1.177, "delta": -0.0228,
            "stderr": 2.7e-3, "difference": 1.8e-3, "difference_stderr": 4.2e-3,
        },
        "attribution": {
            "by_layer": [{"name": f"layers.{k}", "contribution": x} for k, x in enumerate(shares)],
            "by_kind": [{"name": f"kind {k}", "contribution": x} for k, x in enumerate(shares)],
            "by_position": [
                {"first": 2**k, "last": 2 ** (k + 1) - 1, "contribution": x, "tokens": 4000 - k}
                for k, x in enumerate(shares)
            ],
            "by_length": [
                {"first": k, "last": k, "contribution": x, "rollouts": 1000 + k} for k, x in enumerate(shares)
            ],
        },
        "audit": {
            "rollouts_used": 4096, "rollouts_expected": 4096, "tokens_used": 36453, "tokens_expected": 36453,
            "contributions": {"slope_causal": {"sum": slope, "expected": slope}},
            "on_policy": {
                "logp_plus_entropy": {"mean": 0.02, "stderr": 0.03, "stderr_reason": None, "z": 0.633},
                "dlogp": None,
            },
            "warnings": [],
        },
        "not_finite": {},
    }  # fmt: skip


def rollouts():
    tokens = [["12", 0.4], ["+\n", -0.1], [" 5", -0.0001], ["<|eos|>", 0.2]]
    total = sum(value for _, value in tokens)
    one = {"rollout": 17, "group": 3, "reward": 1.0, "prompt": "17=", "contribution": total, "tokens": tokens}
    return [one, one | {"rollout": 18, "reward": None}]


class Page(HTMLParser):
    """The page as a list of (path of open tags, attributes, text) per element; unbalanced tags fail."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.style = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {[e['tag'] for e in self.open]}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": list(self.open)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag=None, class_=None, within=None):
        """Elements by tag, class and the id of an element they are in."""
        return [
            e
            for e in self.elements
            if (tag is None or e["tag"] == tag)
            and (class_ is None or class_ in (e["attrs"].get("class") or "").split())
            and (within is None or any(above["attrs"].get("id") == within for above in e["inside"]))
        ]

    def values(self, within=None):
        return [float(e["attrs"]["value"]) for e in self.all("data", within=within)]

    @property
    def text(self):
        return next(e["text"] for e in self.elements if e["tag"] == "body")


def page(run=None, shown=None):
    return Page(report.html(content() if run is None else run, rollouts() if shown is None else shown))


def test_the_page_is_whole_and_asks_for_nothing():
    found = page()
    tags = {e["tag"] for e in found.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    ids = [e["attrs"]["id"] for e in found.elements if "id" in e["attrs"]]
    assert len(set(ids)) == len(ids)
    for element in found.elements:
        assert "src" not in element["attrs"]
        assert not any(name.startswith("on") for name in element["attrs"])
        assert element["attrs"].get("href", "#changes").removeprefix("#") in ids
    (style,) = found.all("style")
    assert not re.search(r"url\(|@import|</", style["text"])
    (policy,) = [e for e in found.all("meta") if e["attrs"].get("http-equiv") == "Content-Security-Policy"]
    assert policy["attrs"]["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert [e["tag"] for e in found.elements].count("h1") == 1


def _hostile(run, shown):
    run["source"] = {HOSTILE: HOSTILE}
    run["versions"][HOSTILE] = HOSTILE
    run["seeds"][HOSTILE] = 1
    run["device"] = HOSTILE
    run["audit"]["warnings"] = [HOSTILE]
    run["attribution"]["by_layer"][0]["name"] = HOSTILE
    run["attribution"]["by_kind"][0]["name"] = HOSTILE
    run["measured"][0]["verdict_reason"] = HOSTILE
    run["measured"][1]["stderr_reason"] = HOSTILE
    shown[0] = shown[0] | {"prompt": HOSTILE, "tokens": [[HOSTILE, 0.1]]}
    return run, shown


def test_text_from_outside_is_text():
    warned = content()
    warned["audit"]["warnings"] = ["one"]
    plain, hostile = page(warned), page(*_hostile(content(), rollouts()))
    assert {e["tag"] for e in hostile.elements} == {e["tag"] for e in plain.elements}
    known = {name for e in plain.elements for name in e["attrs"]}
    assert {name for e in hostile.elements for name in e["attrs"]} == known
    assert hostile.text.count(VISIBLE) >= 12  # each place once, and the token in the list of largest ones


def test_what_cannot_be_encoded_is_shown_by_its_code():
    run = content()
    run["source"] = {"policy": "/data/\udcff"}  # an undecodable file name
    text = report.html(run, [])
    text.encode("utf-8")
    assert "/data/\\udcff" in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "This update lowers entropy by 0.0066 ± 0.0006 nats per token at step size 1e-4 (measured)."),
        (
            {"delta": 2.44e-7, "stderr": 1.3e-8, "interval": [2.1e-7, 2.7e-7]},
            "This update raises entropy by (2.44 ± 0.13)×10⁻⁷ nats per token at step size 1e-4 (measured).",
        ),
        (
            {"interval": [-0.014, 0.001]},
            "This update does not change entropy by an amount that can be told from zero at step size 1e-4: "
            "−0.0066 ± 0.0006 nats per token (measured).",
        ),
        (
            {"interval": None, "stderr": None, "stderr_reason": "there is one group"},
            "This update lowers entropy by 0.00661 nats per token at step size 1e-4 "
            "(measured, no error bar: there is one group).",
        ),
        (
            {"verdict": "unusable"},
            "This update lowers entropy by 0.0076 ± 0.0005 nats per token at step size 1e-4 "
            "(predicted; the measurement is unusable).",
        ),
        (
            {"below_noise_floor": True},
            "This update lowers entropy by 0.0076 ± 0.0005 nats per token at step size 1e-4 "
            "(predicted; the measurement is below the noise floor of the arithmetic).",
        ),
        (
            {"eta": 2e-4},
            "This update lowers entropy by 0.0076 ± 0.0005 nats per token at step size 1e-4 "
            "(predicted; not measured there).",
        ),
    ],
)
def test_the_answer_comes_first_in_one_sentence(changes, sentence):
    run = content()
    run["measured"][2].update(changes)
    assert answer(run) == sentence
    assert [e["text"] for e in page(run).all("h1")] == [sentence]


def test_without_an_interval_two_standard_errors_decide():
    run = content()
    run["measured"][2].update(interval=None, delta=-1.9e-3, stderr=1e-3)
    assert "told from zero" in answer(run)
    run["measured"][2].update(delta=-2.1e-3)
    assert "lowers entropy" in answer(run)


def test_shares_are_given_only_where_they_mean_something():
    run = content()
    causal = run["slope"][0]
    # −36 in the same contexts, −100 + 60 through other answers; −60 / 1.2 · 1e-4 is the change of length.
    assert ways(run) == (
        "Of the predicted change, 53% comes through other answers (0.5% shorter on average) and 47% "
        "from next-token distributions that change in the same contexts."
    )
    causal["interval"] = [-160.0, 8.0]
    assert "%" not in ways(run).replace("(0.5% shorter", "") and "opposite" not in ways(run)
    causal.update(interval=[-160.0, -8.0], pathwise=-116.0, length_correction=-60.0, score=100.0)
    assert ways(run) == (
        "The predicted change is −0.0116 nats per token from next-token distributions that change in the "
        "same contexts, and +0.0040 through other answers (0.5% longer on average). The two have opposite "
        "signs: neither is a share of the whole."
    )
    causal["score"] = None
    assert ways(run) is None


def test_the_head_has_prediction_measurement_and_what_an_uncorrected_loop_reports():
    terms = page().all("dl", class_="comparison")[0]["text"]
    assert "Predicted before the step−0.0076 ± 0.0005 nats per token" in terms
    assert "Measured by importance sampling−0.0066 ± 0.0006 nats per token" in terms
    assert "without the length correction reports−0.0308 nats per token" in terms


def test_every_number_of_the_run_is_on_the_page():
    run, found = content(), page()
    for entry in run["measured"]:
        names = ("eta", "delta", "stderr", "predicted_linear", "predicted_linear_stderr", "predicted_uncorrected")
        names += ("predicted_quadratic", "predicted_quadratic_stderr", "prediction_error", "prediction_error_stderr")
        assert {entry[name] for name in names} | set(entry["interval"]) <= set(found.values("changes"))
        names = ("ess", "ess_fraction", "ess_tokens", "max_weight", "mean_weight", "smoothed_delta")
        assert {entry[name] for name in names} | {0.31, entry["khat"]["wT"]} <= set(found.values("reliability"))
        assert entry["verdict_reason"] in found.text
    for entry in run["slope"]:
        names = ("value", "stderr", "jackknife_stderr", "pathwise", "score", "length_correction", "uncorrected")
        assert {entry[name] for name in names} | set(entry["interval"]) <= set(found.values("slope"))
    slope = set(found.values("slope"))
    assert {run["curvature"][name] for name in ("value", "stderr", "score", "cross", "pathwise", "step")} <= slope
    assert set(run["trust"].values()) <= slope
    assert run["noise_floor"] in found.values("reliability")
    fresh = run["fresh_check"]
    fresh_names = ("delta", "stderr", "difference", "difference_stderr")
    assert {fresh[name] for name in fresh_names} <= set(found.values("changes"))
    for rows in run["attribution"].values():
        assert {row["contribution"] * STEP for row in rows} <= set(found.values("attribution"))


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


@pytest.mark.parametrize(
    ("value", "stderr", "digits", "text"),
    [
        (-6.6068, 0.56, 2, "−6.61"),
        (-6.6068, 0.56, 1, "−6.6"),
        (123.4, 20.0, 2, "123"),
        (0.5, 0.0996, 2, "0.50"),
        (2.0, None, 2, "2.00"),
        (-0.01234, None, 2, "−0.0123"),
        (0.0, None, 2, "0"),
        (0.0, 0.01, 2, "0.000"),
    ],
)
def test_digits_follow_the_error(value, stderr, digits, text):
    assert numbers.rounded(value, stderr, digits=digits) == text


@pytest.mark.parametrize(
    ("eta", "text"), [(1e-4, "1e-4"), (-2.5e-5, "−2.5e-5"), (0.01, "0.01"), (1e-6 * 3, "3e-6"), (0.0, "0"), (2.0, "2")]
)
def test_eta_is_written_as_it_is_typed(eta, text):
    assert numbers.step_text(eta) == text


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


def test_tokens_are_all_there_in_order_with_their_numbers():
    found = page()
    first = next(iter(found.all("p", class_="tokens")))
    tokens = [e for e in found.all("span", class_="token") if first in e["inside"]]
    assert [e["text"] for e in tokens] == ["12", "+⏎\n", " 5", "<|eos|>"]
    assert [e["attrs"]["class"] for e in tokens] == ["token raises-4", "token lowers-1", "token", "token raises-2"]
    said = [e["attrs"]["title"] for e in tokens]
    assert said[0] == "40.0 (10⁻⁶ nats per token)" and said[1] == "−10.0 (10⁻⁶ nats per token)"


def test_a_long_rollout_is_cut_and_says_by_how_much():
    tokens = [["a", 0.001]] * SHOWN_TOKENS + [["z", 0.2], ["z", 0.3]]
    total = sum(value for _, value in tokens)
    found = page(shown=[rollouts()[0] | {"tokens": tokens, "contribution": total}])
    (text,) = found.all("p", class_="tokens")
    assert text["text"] == "a" * SHOWN_TOKENS
    assert "… and 2 more tokens, together 50000 (10⁻⁹ nats per token)" in found.text


def headings(found):
    return [e["text"] for e in found.all("h2")]


def test_what_a_run_does_not_have_is_left_out():
    run = content()
    new = {"interval", "jackknife_stderr", "warnings", "khat", "smoothed_delta", "below_noise_floor", "verdict"}
    new |= {"verdict_reason", "predicted_quadratic", "predicted_quadratic_stderr"}
    new |= {"prediction_error", "prediction_error_stderr"}
    for entry in [*run["slope"], *run["measured"]]:
        for name in new & set(entry):
            del entry[name]
    for name in ("curvature", "trust", "noise_floor", "attribution", "fresh_check", "not_finite"):
        del run[name]
    found = page(run, [])
    assert headings(page()) == [
        "Change of entropy",
        "Can the measurement be trusted?",
        "Slope and curvature at η = 0",
        "Where it comes from",
        "Rollouts, token by token",
        "Audit and warnings",
        "How it was run",
    ]
    kept = [h for h in headings(page()) if not h.startswith("Rollouts")]
    assert headings(found) == [h.replace("Slope and curvature", "Slope") for h in kept]
    for word in (
        "Curvature",
        "curvature",
        "η*",
        "k̂ of",
        "Verdict",
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
    assert report.html(content() | {name: None}, []) == report.html(without, [])
    assert report.html(without, []) != report.html(content(), [])


def test_missing_numbers_are_dashes_and_question_marks_with_their_reason():
    run = content()
    run["measured"][3].update(delta=None, stderr=None, interval=None, smoothed_delta=None)
    run["not_finite"] = {"measured.3.delta": "inf"}
    run["slope"][2].update(stderr=None, interval=None, stderr_reason="there is one group")
    found = page(run)
    assert "measured.3.delta is inf" in found.all("ul", class_="warnings")[0]["text"]
    assert "there is one group" in found.text
    assert any(e["text"].endswith("± ?") for e in found.all("td", within="slope"))


def test_warnings_of_every_kind_are_listed_and_announced():
    run = content()
    run["audit"]["warnings"] = ["off policy"]
    run["slope"][0]["warnings"] = ["few groups"]
    run["curvature"]["warnings"] = ["one dominates"]
    run["measured"][1]["warnings"] = ["curved"]
    found = page(run)
    assert [e["text"] for e in found.all("li", within="audit")] == [
        "off policy", "causal slope: few groups", "curvature: one dominates", "ΔH at η = 5e-05: curved"
    ]  # fmt: skip
    (link,) = found.all("a")
    assert link["text"].startswith("4 warnings") and link["attrs"]["href"] == "#audit"
    assert not page().all("a") and "No warnings." in page().text


# Loads the report in a frame as wide as a phone and writes down how wide it became.
FRAME = """<!doctype html><body><iframe style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const root = document.querySelector("iframe").contentDocument.documentElement;
  document.body.textContent = `width ${{root.scrollWidth}} of ${{root.clientWidth}}`;
}}</script>"""


def in_chromium(text, folder):
    """(width of the page in a frame of 390 px, messages on the console)"""
    file = folder / "frame.html"
    file.write_text(FRAME.format(page=html.escape(text)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    options += ["--hide-scrollbars", "--enable-logging=stderr", "--v=0", "--dump-dom", file.as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=60, check=True)
    width = re.search(r"width (\d+) of 390", done.stdout)
    assert width, done.stdout[-500:]
    return int(width[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_chromium_shows_it_without_errors_requests_or_sideways_scrolling(tmp_path):
    run, shown = _hostile(content(), rollouts())
    run["attribution"]["by_kind"][1]["name"] = "model.layers.self_attention." * 9
    shown[1] = shown[1] | {"prompt": "p" * 300, "tokens": [["t" * 300, 0.1], *shown[1]["tokens"]]}
    assert in_chromium(report.html(run, shown), tmp_path) == (390, [])


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize(
    ("added", "width", "message"),
    [
        ("<script>alert(1)</script>", 390, "script"),
        ("<img src='https://example.org/a.png'>", 390, "example.org"),
        ("<p style='width:500px'>wide</p>", 516, None),
    ],
)
def test_chromium_would_notice(tmp_path, added, width, message):
    text = report.html(copy.deepcopy(content()), []).replace("</body>", f"{added}</body>")
    found, messages = in_chromium(text, tmp_path)
    assert found == width
    assert any(message in line for line in messages) if message else messages == []


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
    found = page(run)
    assert len(headings(found)) == 7 and "nan" not in found.text and "None" not in found.text
    assert bool(found.all("figure")) == (change is not _nothing_measured)
    for element in found.elements:
        assert not any(re.search(r"\b(nan|inf)\b", str(value)) for value in element["attrs"].values())
