"""The benchmarks' harness: what breaks is a row, and of dentropy's own a failure too."""

import math

import interleaved
import pytest
import torch
from interleaved import Provider, compare
from report import summary, table
from worker import Recorder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(interleaved, "ROUNDS", 2)
    monkeypatch.setattr(interleaved, "SECONDS", 0.0)
    monkeypatch.setattr(interleaved, "peak_above", lambda call, device: call() and 0.0)  # looks through all memory


def failing(error):
    def call(x):
        raise error

    return call


def after(calls: int):
    """A provider that works that many times."""
    left = iter(range(calls))

    def call(x):
        if next(left, None) is None:
            raise RuntimeError("tired")
        return x

    return call


def case_of(providers, reference="copy") -> tuple[dict, str]:
    """What a case leaves, and what it fails with; its task is to return 1."""
    recorder, said = Recorder(), ""
    try:
        compare(
            recorder, "A case", {"copy": Provider(lambda x: x)} | providers, (1.0,), lambda output: abs(output - 1.0),
            device="cpu", work=8.0, unit="GB/s", reference=reference,
        )  # fmt: skip
    except AssertionError as error:
        said = str(error)
    return recorder.extra_info, said


RIGHT = Provider(lambda x: x, 1e-6)
BROKEN = {
    "raises": (failing(ValueError("no  such\nshape")), "ValueError: no such shape"),
    "not importable": (failing(ModuleNotFoundError("No module named 'x'")), "cannot be imported: No module named 'x'"),
    "out of memory": (failing(torch.OutOfMemoryError("...")), "out of memory"),
    "wrong": (lambda x: x + 0.5, "error 5.0e-01, above 1e-06"),
    "NaN": (lambda x: math.nan, "error nan, above 1e-06"),
    "breaks when timed": (after(4), "RuntimeError: tired"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_peer_is_a_row_and_a_broken_dentropy_a_failure(kind):
    call, why = BROKEN[kind]
    found, said = case_of({"dentropy": RIGHT, "peer": Provider(call, 1e-6), "last": RIGHT})
    assert not said and found["providers"]["peer"] == {"not_run": why}
    if kind == "breaks when timed":
        call = after(4)
    broken, said = case_of({"peer": RIGHT, "dentropy, a part": Provider(call, 1e-6), "last": RIGHT})
    assert said == str({"dentropy, a part": why}) and broken["providers"]["dentropy, a part"] == {"not_run": why}
    for rows, names in ((found, ("copy", "dentropy", "last")), (broken, ("copy", "peer", "last"))):
        for name in names:
            row = rows["providers"][name]
            assert row["min_ms"] <= row["median_ms"] <= row["max_ms"] and row["rate"] > 0
            assert row["fraction_of_reference"] == pytest.approx(1 / row["times_reference"])


def test_what_is_not_there_is_not_tried(monkeypatch):
    monkeypatch.setitem(interleaved.LEFT_OUT, "left out", "it took the GPU down")
    providers = {
        "dentropy": RIGHT,
        "elsewhere": Provider(failing(AssertionError()), package="no_such_package"),
        "on a GPU": Provider(failing(AssertionError()), cuda=True),
        "left out": Provider(failing(AssertionError())),
    }
    found, said = case_of(providers)
    rows = found["providers"]
    assert not said and [rows[name]["not_run"] for name in list(providers)[1:]] == [
        "no_such_package is not installed",
        "needs a GPU",
        "it took the GPU down",
    ]


def test_a_reference_that_breaks_leaves_times_and_no_ratios():
    found, said = case_of({"dentropy": RIGHT, "ceiling": Provider(failing(ValueError("no")))}, "ceiling")
    row = found["providers"]["dentropy"]
    assert not said and row["median_ms"] > 0 and not {"times_reference", "fraction_of_reference"} & set(row)
    assert "| A case | " in summary([found]) and "not run: ValueError: no" in table(found)


def test_reports_of_a_broken_dentropy_say_so():
    found, _ = case_of({"dentropy": Provider(failing(ValueError("no")), 1e-6)})
    assert "| A case | not run: ValueError: no |  |  |" in summary([found])


def test_whoever_loses_the_gpu_is_named(monkeypatch):
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(interleaved.GPUIsLost) as lost:
        compare(
            Recorder(), "A case", {"peer": Provider(failing(ValueError("no")), 1e-6), "dentropy": RIGHT}, (1.0,), abs,
            device="cuda", reference="dentropy",
        )  # fmt: skip
    assert lost.value.args == ("peer", "ValueError: no")
