"""What reaches the terminal: one line an error, which names the option, and nothing that steers the terminal."""

import json
import warnings
from pathlib import Path

import pytest

from dentropy.cli import main
from dentropy.cli.terminal import Terminal, about, quiet, remark, say, visible
from dentropy.experiment.progress import token_bar

SAVED = Path(__file__).parents[1] / "experiment" / "schema_1" / "results.json"
ESCAPE = "\x1b]0;owned\x07\x9b2J\u202e"


def test_results_cannot_steer_it(tmp_path, capsys):
    content = json.loads(SAVED.read_text())
    content["source"]["policy"] = content["measured"][0]["verdict_reason"] = ESCAPE
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert main(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07\\x9b2J\\u202e" in out and "η" in out
    assert all(c == "\n" or c.isprintable() for c in out)


def test_file_names_cannot_steer_it(tmp_path, capsys):
    folder = tmp_path / ESCAPE
    assert main(["show", str(folder)]) == 2
    folder.mkdir()
    (folder / "results.json").write_text("{")
    assert main(["show", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "\x1b" not in err and "\\x1b]0;owned" in err


def test_messages_about_an_argument_name_its_option(capsys):
    terminal = Terminal(["sample", "--max-new-tokens", "3", "--policy=x", "--etas"])
    terminal.complain("max_new_tokens: 3, expected less")
    terminal.complain("policy: 'x' could\nnot be loaded")
    terminal.complain("temperature: not an option that was given")
    with terminal.open(), about("--rollouts"):
        warnings.warn("r.jsonl: no end token", stacklevel=1)
        warnings.warn("policy: falls back", stacklevel=1)
        with pytest.raises(ValueError, match="^--after: is gone"), about("--after", "policy"):
            warnings.warn("policy: falls back", stacklevel=1)
            raise ValueError("policy: is gone")
    assert capsys.readouterr().err.splitlines() == [
        "dentropy: --max-new-tokens: 3, expected less",
        "dentropy: --policy: 'x' could not be loaded",
        "dentropy: temperature: not an option that was given",
        "dentropy: warning: --rollouts: r.jsonl: no end token",
        "dentropy: warning: --policy: falls back",
        "dentropy: warning: --after: falls back",
    ]


def test_a_warning_that_comes_again_is_said_once_and_counted_at_the_end(capsys):
    with Terminal([]).open():
        for _ in range(11):
            warnings.warn("out of memory", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert capsys.readouterr().err.splitlines() == [
        "dentropy: warning: out of memory",
        "dentropy: warning: another",
        "dentropy: warning, 11 times in all: out of memory",
    ]


@pytest.mark.parametrize("bug", [lambda: int("x"), lambda: {}["x"], lambda: [] + 1, lambda: [].x])
def test_a_bug_of_our_own_keeps_its_traceback(bug, monkeypatch):
    monkeypatch.setattr("dentropy.experiment.run_folder.load", lambda _: bug())
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        main(["show", "x"])


def test_lines_and_letters_are_left_as_they_are():
    text = "ΔH at η = 1\n  ± 0.1 \N{NO-BREAK SPACE}x 漢字"
    assert visible(text) == text


def test_quiet_leaves_results_warnings_and_errors(capsys):
    terminal = Terminal(["probe"])
    with terminal.open(), quiet(True), token_bar("passes", 2) as progress:
        remark("rollouts: a file of TRL")
        warnings.warn("few rollouts", stacklevel=1)
        say("slope 1")
        progress(1)
        terminal.complain("rollouts: none")
    out, err = capsys.readouterr()
    assert out == "slope 1\n" and err == "dentropy: warning: few rollouts\ndentropy: rollouts: none\n"
    remark("rollouts: a file of TRL")
    assert capsys.readouterr().err == "dentropy: rollouts: a file of TRL\n"


@pytest.mark.parametrize("command", ["demo", "probe", "sample", "show"])
def test_every_command_can_be_quiet(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--quiet" in capsys.readouterr().out
