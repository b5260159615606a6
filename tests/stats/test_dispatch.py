"""Which implementation serves a call."""

import subprocess
import sys

import pytest
import torch

from dentropy.stats import dispatch
from dentropy.stats.dispatch import kernels_serve

SINGLE, DOUBLE = torch.zeros(1), torch.zeros(1, dtype=torch.float64)


@pytest.fixture
def interpreting(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(dispatch, "_check_interpreter", lambda: None)


@pytest.mark.parametrize("value, asked", [("", False), ("0", False), ("off", False), ("1", True), ("On", True)])
def test_on_the_cpu_kernels_serve_only_when_interpreted(interpreting, monkeypatch, value, asked):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert kernels_serve(SINGLE) is asked
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not kernels_serve(SINGLE)


def test_float64_is_left_to_the_plain_path_unless_a_kernel_takes_it(interpreting):
    assert kernels_serve(SINGLE, None, SINGLE.half())
    assert not kernels_serve(SINGLE, None, DOUBLE)
    assert kernels_serve(DOUBLE, float64=True)


def test_without_triton_the_plain_path_serves(interpreting, monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert not kernels_serve(SINGLE)


def test_other_devices_are_left_to_the_plain_path(interpreting):
    assert not kernels_serve(SINGLE.to("meta"))


def test_an_interpreter_that_is_asked_for_too_late_is_an_error():
    pytest.importorskip("triton")
    code = (
        "import os, triton.language, torch, dentropy; os.environ['TRITON_INTERPRET'] = '1';"
        "dentropy.token_stats(torch.zeros(1, 2), torch.tensor([0]))"
    )
    run = subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True)
    assert "TRITON_INTERPRET: set after Triton was imported, expected before Python starts" in run.stderr


def test_triton_is_not_imported_before_a_kernel_is_used():
    code = (
        "import sys, torch, dentropy; z = torch.zeros(2, 3);"
        "dentropy.token_stats(z, torch.tensor([0, 1]), z); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PATH": ""}).returncode == 0
