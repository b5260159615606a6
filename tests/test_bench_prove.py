"""`bench/prove.py` without a GPU: what it plans, what it records of whatever happens, and what it says of it."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import prove
import pytest
import torch
import verdict
from plan import STEPS, Case, Checks, Goal

ROOT = Path(__file__).parents[1]
CASES = [step for step in STEPS if isinstance(step, Case)]


def test_every_case_is_a_call_that_its_benchmark_takes():
    for case in CASES:
        module, function = case.function.split(".")
        signature = inspect.signature(getattr(importlib.import_module(module), function))
        for arguments in (case.full, case.tiny or case.full):
            signature.bind(None, **arguments)
        assert getattr(torch, case.full.get("dtype", "bfloat16")) in (torch.bfloat16, torch.float32)
    assert {case.function for case in CASES} == {case.function for case in CASES if case.tiny}  # a dry run has them all


def test_every_step_has_a_name_of_its_own_and_tests_that_are_there():
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        if isinstance(step, Checks):
            assert (ROOT / step.full[0]).exists() and step.minutes <= 3


def test_collect_says_what_it_would_do(capsys):
    assert prove.main(["--collect"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [step.name for step in STEPS]
    assert sum("goal: " in line for line in lines) == sum(bool(case.goals) for case in CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs_without_one(capsys, tmp_path):
    with pytest.raises(SystemExit):
        prove.main(["--out", str(tmp_path / "proof")])
    assert "--collect and --dry-run need none" in capsys.readouterr().err and not list(tmp_path.iterdir())


# Does to each case what its name says; knows nothing of PyTorch.
WORKER = """
import json, os, sys, time
asked = json.loads(sys.argv[2])
names = json.loads(os.environ["NAMES"])
def say(**line):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(line) + "\\n")
say(machine={"gpu": "a card"})
for i in asked["cases"]:
    say(begins=i)
    name = names[i]
    if name == "dies":
        os._exit(7)
    if name == "hangs":
        say(machine={"pid": os.getpid()})
        time.sleep(60)
    if name == "loses the GPU" or name == "a peer loses it" and "peer" not in asked["left_out"]:
        who = "peer" if "peer" in name else "dentropy"
        say(ends=i, seconds=0, lost=[who, "why"], failed=who + " took the GPU down: why")
        sys.exit()
    say(ends=i, seconds=0, left_out=asked["left_out"], **({"failed": "wrong"} if name == "fails" else {}))
"""


def proof_of(names: list[str], tmp_path, monkeypatch, minutes=1.0):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(prove, "WORKER", worker)
    monkeypatch.setattr(prove, "CASE_SECONDS", 2)
    steps = tuple(Case(name, "", {}, {}) for name in names)
    for module in (prove, verdict):
        monkeypatch.setattr(module, "STEPS", steps)
    proof = prove.Proof(tmp_path / "proof", minutes, False)
    prove.run_all(proof, {"NAMES": json.dumps(names)})
    return json.loads((tmp_path / "proof" / "prove.json").read_text())


def test_whatever_a_case_does_the_others_run(tmp_path, monkeypatch):
    names = ["first", "a peer loses it", "dies", "fails", "loses the GPU", "hangs", "last"]
    content = proof_of(names, tmp_path, monkeypatch)
    assert content["machine"] == {"gpu": "a card"} and list(content["steps"]) == names
    said = {name: step.get("failed") for name, step in content["steps"].items()}
    assert said == {
        "first": None,
        "a peer loses it": None,
        "dies": "its process ended early",
        "fails": "wrong",
        "loses the GPU": "dentropy took the GPU down: why",
        "hangs": "stopped after 2 s",
        "last": None,
    }
    assert content["steps"]["first"]["left_out"] == {}
    assert content["steps"]["last"]["left_out"] == {"peer": "took the GPU down: why"}
    assert len(content["failures"]) == 4


def test_what_there_was_no_time_for_says_so(tmp_path, monkeypatch):
    content = proof_of(["first", "hangs", "last"], tmp_path, monkeypatch, minutes=1.5 / 60)
    assert "not_run" not in content["steps"]["first"]
    assert content["steps"]["hangs"] == content["steps"]["last"] == {"not_run": prove.NO_TIME}
    with pytest.raises(ProcessLookupError):
        os.kill(content["machine"]["pid"], 0)


def test_this_checkout_is_what_runs_installed_or_not():
    code = "import dentropy, dentropy.kernels as k; print(dentropy.__file__, k.__file__)"
    with prove.importable() as environment:
        said = subprocess.run(
            [sys.executable, "-S", "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        found = [Path(path).resolve() for path in said.stdout.split()]
    assert found == [ROOT / "dentropy" / "__init__.py", ROOT / "kernels" / "__init__.py"], said.stderr


PYTEST = """
tests/test_a.py::test_one[x y] PASSED    [ 25%]
tests/test_a.py::test_two FAILED         [ 50%]
tests/test_a.py::test_three SKIPPED (no) [ 75%]
"""
SUMMARY = "FAILED tests/test_a.py::test_two - assert 1 == 2\n"


@pytest.mark.parametrize(
    "text, code, said, failed",
    [
        (PYTEST + SUMMARY, 1, "1 passed, 1 failed, 1 skipped", "tests/test_a.py::test_two - assert 1 == 2"),
        (PYTEST, None, "1 passed, 1 failed, 1 skipped, then its time was up", "then its time was up"),
        (PYTEST.replace("FAILED", "PASSED"), 0, "2 passed, 0 failed, 1 skipped", None),
        ("ImportError: conftest", 4, "0 passed, 0 failed, 0 skipped", "pytest ended with 4: ImportError: conftest"),
    ],
)
def test_what_pytest_said(text, code, said, failed):
    found = prove.of_pytest(text, code)
    assert found["said"] == said
    assert ("failed" in found) == (failed is not None) and (failed is None or failed in found["failed"])


def rows(times: float, fraction: float, reference: str) -> dict:
    """Of a case that takes `times` as long as its reference."""
    ours = dict(
        median_ms=2.0, peak_mib_above_inputs=3.0, rate=600.0, times_reference=times, fraction_of_reference=fraction
    )
    parts = ("dentropy, forward alone", "dentropy, tangent alone", "dentropy, columns left on the GPU", "classic loop")
    broken = {"a peer": {"not_run": "ImportError: no"}}
    return dict.fromkeys(("dentropy", *parts), ours) | {reference: ours | dict(rate=700.0)} | broken


def content_of(**changes) -> dict:
    steps = {
        step.name: dict(providers=rows(2.0, 0.9, "copy"), reference="copy", unit="TFLOP/s")
        if isinstance(step, Case)
        else dict(said="3 passed, 0 failed, 0 skipped")
        for step in STEPS
    }
    return dict(minutes=10.0, dry_run=False, machine=dict(gpu="A card"), steps=steps) | verdict.verdict(steps) | changes


def test_the_table_names_goals_that_are_missed_within_its_lines():
    content = content_of()
    met = {(goal["step"], goal["goal"]): goal["met"] for goal in content["goals"]}
    assert met["head, moving, bfloat16, D 4096", "88% of the reference's rate"]
    assert not met["head, fixed, bfloat16, D 4096", "94% of the reference's rate"]
    assert met["whole pass, 1.5B, bfloat16, 8 x 1024", "2.2 times a plain forward"]
    assert not met["whole pass, 1.5B, bfloat16, 8 x 1024", "4 times faster than the classic loop"]
    lines = verdict.table(content)
    assert (
        len(lines) <= verdict.LINES
        and "  MISSED head, fixed, bfloat16, D 4096: 94% of the reference's rate, found 0.9" in lines
    )
    assert "logits, order 0, 8192 rows: 2 ms, 3 MiB, 90% of copy; dentropy, forward alone 1.00x" in lines[3]
    assert "a peer -" in lines[3]
    kernels = {line["kernel"] for line in content["roofline"]}
    assert kernels == {"token_states", "linear_states", "attention", "attention_tangent", "sequence_sums"}
    assert any("token_states" in line and "90% of the 700 TFLOP/s of copy" in line for line in lines)


def test_a_goal_without_its_figure_is_missed_and_a_table_too_long_says_so():
    case = Case("c", "", {}, {}, goals=(Goal("fast", lambda rows: rows["dentropy"]["rate"], least=1.0),))
    assert verdict.of_goals(case, {"dentropy": {"not_run": "x"}})[0] | {"why": ""} == dict(
        step="c", goal="fast", value=None, met=False, why=""
    )
    lines = verdict.table(content_of(failures=[f"step {i}: no" for i in range(50)]))
    assert len(lines) == verdict.LINES and "lines more, in the file" in lines[-1]
