"""What the tests of the report share: a run to show, made by the real code, and the page read back."""

import copy
from html.parser import HTMLParser

from runs import small_run

from dentropy.experiment import rollout_rows
from dentropy.experiment.report.page import html

STEP = 1e-4
HOSTILE = "<script>alert('x')</script>&amp;\" onmouseover=\"y\x00\x1b"
VOID = {"br", "col", "meta"}


def content():
    """The content of a real run with the numbers of a well measured update in place of its own."""
    run, slope, curvature, uncorrected = copy.deepcopy(small_run().content), -76.0, 4.1e4, -308.1
    put(run, step_size=STEP, base_entropy=1.2, noise_floor=3e-7)
    for entry, value, stderr, pathwise, score, length in zip(
        run["slope"],
        (slope, -68.2, -107.5),
        (5.0, 5.5, 46.9),
        (-36.0, -36.0, -36.0),
        (-100.0, -82.2, -121.5),
        (60.0, 50.0, 50.0),
    ):
        put(entry, **estimate(value, stderr), pathwise=pathwise, score=score, length_correction=length)
        put(entry, uncorrected=uncorrected, other_answers=score + length)
        put(
            entry["part_stderrs"], pathwise=2.1, other_answers=4.4, score=31.0, length_correction=33.0, uncorrected=29.0
        )
    run["horizon"] = {"tokens": 16, **estimate(-71.0, 4.0), "left_out": -5.0, "left_out_stderr": 3.0}
    put(run["curvature"], **estimate(curvature, 1.9e4), score=7e4, cross=-4.2e4, pathwise=1.3e4, step=2.5e-5)
    put(run["trust"], eta_star=3.7e-3, linear_until=3.7e-4, warnings=[])
    for entry, eta, delta, stderr, verdict in zip(
        run["measured"],
        (-STEP, STEP / 2, STEP, 4 * STEP),
        (7.1e-3, -3.35e-3, -6.61e-3, -0.0246),
        (5.6e-4, 2.8e-4, 5.6e-4, 3.1e-3),
        ("reliable", "reliable", "reliable", "strained"),
    ):
        put(entry, eta=eta, delta=delta, **errors(delta, stderr), smoothed_delta=1.01 * delta, verdict=verdict)
        put(entry, predicted_linear=slope * eta, predicted_linear_stderr=5.0 * abs(eta))
        put(entry, predicted_quadratic=slope * eta + curvature * eta**2 / 2)
        put(entry, predicted_quadratic_stderr=5.2 * abs(eta), predicted_uncorrected=uncorrected * eta)
        put(entry, prediction_error=slope * eta - delta, prediction_error_stderr=2.1 * abs(eta))
    put(run["fresh_check"], eta=4 * STEP, delta=-0.0228, stderr=2.7e-3, difference=1.8e-3, difference_stderr=4.2e-3)
    for change in changes_of(run["forecast"]):
        for entry, eta in zip(change, (-STEP, STEP / 2, STEP, 4 * STEP)):
            put(entry, eta=eta)
    for entry in run["forecast"]["reward"]["changes"]:
        put(entry, value=120 * entry["eta"], **errors(120 * entry["eta"], 3e-3))
    for name in ("by_position", "by_length", "by_lag", "by_layer", "by_kind"):
        rows = list(zip(run["attribution"][name], (-90.0, 24.5, -10.5)))
        run["attribution"][name] = [put(row, contribution=share) for row, share in rows]
        if "stderr" in rows[0][0]:
            for (row, _), stderr in zip(rows, (6.0, 5.5, 8.0), strict=True):
                put(row, stderr=stderr)
    put(run["audit"], warnings=[])
    return run


def changes_of(forecast):
    """The lists with an entry for each η."""
    means = [forecast[name] for name in ("entropy", "reward", "length", "exchange_rate")] + (
        forecast["pass_at_k"] or []
    )
    return [entry["changes"] for entry in (*means, *forecast["kl"].values())]


def put(entry, **values):
    """Other values for fields that are there."""
    assert set(values) <= set(entry), f"no such fields: {set(values) - set(entry)}"
    entry.update(values)
    return entry


def estimate(value, stderr):
    return {"value": value, **errors(value, stderr)}


def errors(value, stderr):
    interval = [value - 1.96 * stderr, value + 1.96 * stderr]
    return {"stderr": stderr, "jackknife_stderr": 1.01 * stderr, "interval": interval, "warnings": []}


def rollouts():
    """Two rollouts of a real run, with other tokens and numbers."""
    result = small_run()
    one, two = rollout_rows.largest(result.base, result.batch, result.slopes["causal"].contributions)[:2]
    tokens = [["12", 0.4], ["+\n", -0.1], [" 5", -0.0001], ["<|eos|>", 0.2]]
    total = sum(value for _, value in tokens)
    return [put(row, tokens=tokens, contribution=total, reward=reward) for row, reward in ((one, 1.0), (two, None))]


class Page(HTMLParser):
    """The page as a list of (path of open tags, attributes, text) per element; unbalanced tags fail."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.source = [], [], text
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


def page(run=None, shown=None, pictures=None):
    run, shown = content() if run is None else run, rollouts() if shown is None else shown
    return Page(html(run, shown, pictures=pictures or {}))


def headings(found):
    return [e["text"] for e in found.all("h2")]


def hostile(run, shown):
    """Text from outside that tries to be more than text, wherever there is such."""
    run["source"] = {HOSTILE: HOSTILE}
    run["versions"][HOSTILE] = HOSTILE
    run["seeds"][HOSTILE] = 1
    run["device"] = run["provenance"]["command"] = HOSTILE
    run["audit"]["warnings"] = [HOSTILE]
    run["attribution"]["by_layer"][0]["name"] = HOSTILE
    run["attribution"]["by_kind"][0]["name"] = HOSTILE
    run["measured"][0]["verdict_reason"] = HOSTILE
    run["measured"][1]["stderr_reason"] = HOSTILE
    shown[0] = shown[0] | {"prompt": HOSTILE, "tokens": [[HOSTILE, 0.1]]}
    return run, shown
