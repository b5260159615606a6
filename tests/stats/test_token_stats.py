"""What every implementation refuses, and which one serves a call. Numbers: kernels/test_token_stats.py."""

import subprocess
import sys

import pytest
import torch

from dentropy import linear_token_stats, token_stats
from dentropy.stats import plain

Z = torch.zeros(3, 5)
Y = torch.tensor([0, 4, 2])
H, W = torch.zeros(3, 2), torch.zeros(5, 2)

BAD_LOGITS = {
    r"logits is a list, expected a torch\.Tensor of shape \[N, V\]": dict(logits=[[0.0]]),
    r"logits has shape \[2, 3, 5\], expected \[N, V\]": dict(logits=torch.zeros(2, 3, 5)),
    r"logits has shape \[3, 0\], expected a vocabulary of at least 1": dict(logits=torch.zeros(3, 0)),
    r"logits has dtype torch\.int64, expected one of float16, bfloat16, float32,": dict(logits=Z.long()),
    r"dlogits has shape \[3, 4\], expected \[3, 5\] as logits": dict(dlogits=torch.zeros(3, 4)),
    r"dlogits is on meta, expected cpu": dict(dlogits=Z.to("meta")),
    r"dlogits is None, expected a tensor beside d2logits": dict(d2logits=Z),
    r"d2logits has shape \[1, 5\], expected \[3, 5\] as logits": dict(dlogits=Z, d2logits=Z[:1]),
}
BAD_HEADS = {
    r"hidden has shape \[2\], expected \[N, D\]": dict(hidden=torch.zeros(2)),
    r"weight has shape \[5, 3\], expected \[V, 2\]": dict(weight=torch.zeros(5, 3)),
    r"weight has shape \[0, 2\], expected a vocabulary of at least 1": dict(weight=torch.zeros(0, 2)),
    r"dhidden has shape \[2, 2\], expected \[3, 2\] as hidden": dict(dhidden=torch.zeros(2, 2)),
    r"dweight has shape \[2, 5\], expected \[5, 2\] as weight": dict(dweight=W.T),
    r"bias has shape \[3\], expected \[5\]": dict(bias=torch.zeros(3)),
    r"dbias has dtype torch\.bool": dict(dbias=torch.zeros(5, dtype=torch.bool)),
}
BAD_IN_BOTH = {
    r"targets has shape \[2\], expected \[3\], one token id per row": dict(targets=Y[:2]),
    r"targets has dtype torch\.float32, expected one of int32, int64": dict(targets=Y.float()),
    r"targets is on meta, expected cpu": dict(targets=Y.to("meta")),
    r"targets\[1\] is 5, expected a token id in \[0, 5\)": dict(targets=torch.tensor([0, 5, 9])),
    r"targets\[2\] is -1, expected a token id in \[0, 5\)": dict(targets=torch.tensor([0, 1, -1])),
    r"temperature is 0, expected a finite number above 0": dict(temperature=0),
    r"temperature is nan, expected a finite number above 0": dict(temperature=float("nan")),
    r"temperature is None, expected a finite number above 0": dict(temperature=None),
    r"softcap is -1\.0, expected a finite number above 0 or None": dict(softcap=-1.0),
    r"softcap is inf, expected a finite number above 0 or None": dict(softcap=float("inf")),
}


@pytest.mark.parametrize("function", [token_stats, plain.token_stats], ids=["public", "reference"])
@pytest.mark.parametrize("message", BAD_LOGITS | BAD_IN_BOTH)
def test_bad_input_for_token_stats(function, message):
    arguments = dict(logits=Z, targets=Y) | (BAD_LOGITS | BAD_IN_BOTH)[message]
    with pytest.raises(ValueError, match="^" + message):
        function(**arguments)


@pytest.mark.parametrize("function", [linear_token_stats, plain.linear_token_stats], ids=["public", "reference"])
@pytest.mark.parametrize("message", BAD_HEADS | BAD_IN_BOTH)
def test_bad_input_for_linear_token_stats(function, message):
    arguments = dict(hidden=H, weight=W, targets=Y) | (BAD_HEADS | BAD_IN_BOTH)[message]
    with pytest.raises(ValueError, match="^" + message):
        function(**arguments)


def test_on_the_cpu_the_reference_serves(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    calls = []
    body = plain._stats_of_states
    monkeypatch.setattr(plain, "_stats_of_states", lambda *a, **k: calls.append(1) or body(*a, **k))
    token_stats(Z, Y)
    linear_token_stats(H, W, Y)
    assert len(calls) == 2


def test_triton_is_not_imported_before_a_kernel_is_used():
    code = (
        "import sys, torch, dentropy; z = torch.zeros(2, 3);"
        "dentropy.token_stats(z, torch.tensor([0, 1]), z); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PATH": ""}).returncode == 0
