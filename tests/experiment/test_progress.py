import re
import sys
import time

import pytest

from dentropy.experiment import progress
from dentropy.experiment.progress import hidden, rollout_bar, token_bar

BARS = [(token_bar, ("passes", 1000), (100,)), (rollout_bar, ("sampling", 10), (1, 100))]


@pytest.fixture
def terminal(capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    return capsys


def half(bar, arguments, step, wait):
    with bar(*arguments) as advance:
        for _ in range(5):
            time.sleep(wait)
            advance(*step)


@pytest.mark.parametrize("bar, arguments, step", BARS)
def test_a_bar_shows_the_rate_and_the_time_left(terminal, bar, arguments, step):
    half(bar, arguments, step, 0.11)
    shown = terminal.readouterr().err.split("\r")[-3]
    assert re.search(r"50%.* tokens/s", shown) and "<00:0" in shown, shown


def test_nothing_is_shown_of_what_ends_at_once(terminal):
    with token_bar("passes", 1000):
        pass
    assert terminal.readouterr().err == ""


@pytest.mark.parametrize("bar, arguments, step", BARS)
def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch, bar, arguments, step):
    half(bar, arguments, step, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.1)
    half(bar, arguments, step, 0.06)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3 and all(re.search("%.* tokens/s", line) and "\r" not in line for line in lines), lines


@pytest.mark.parametrize("bar, arguments, step", BARS)
def test_what_is_hidden_shows_nothing(terminal, bar, arguments, step):
    with hidden():
        half(bar, arguments, step, 0.11)
    assert terminal.readouterr().err == ""
