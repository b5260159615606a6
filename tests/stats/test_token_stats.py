"""The public functions on a CPU: the numbers of the plain path. What they refuse: test_checks."""

import pytest
import torch
from draws import head, logits_and_tangents

from dentropy import linear_token_stats, token_stats
from dentropy.stats import plain


@pytest.fixture
def of_the_plain_path(monkeypatch):
    """The tables that the plain path makes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made, body = [], plain._stats_of_states
    monkeypatch.setattr(plain, "_stats_of_states", lambda *args: made.append(body(*args)) or made[-1])
    return made


TRANSFORM = dict(softcap=3.0, temperature=1.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_token_stats_hands_everything_on(of_the_plain_path, dtype):
    inputs = logits_and_tangents(dtype=dtype)
    assert token_stats(*inputs, **TRANSFORM) is of_the_plain_path[0]
    for got, want in zip(of_the_plain_path[0], plain.token_stats(*inputs, **TRANSFORM)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_token_stats_hands_everything_on(of_the_plain_path, dtype):
    inputs = head(dtype)
    assert linear_token_stats(**inputs, **TRANSFORM) is of_the_plain_path[0]
    for got, want in zip(of_the_plain_path[0][:4], plain.linear_token_stats(**inputs, **TRANSFORM)):
        torch.testing.assert_close(got, want)


def test_results_ask_for_no_gradient():
    logits, targets, *tangents = logits_and_tangents()
    inputs = head()
    assert not any(field.requires_grad for field in token_stats(logits.requires_grad_(), targets, *tangents))
    inputs["weight"].requires_grad_()
    assert not any(field.requires_grad for field in linear_token_stats(**inputs)[:4])
