"""After all passes: what was computed is printed and kept, whatever became of the place it was to go to."""

import errno
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from runs import small_run

from dentropy.cli import main
from dentropy.experiment import probe, run_folder
from dentropy.experiment.report import page
from dentropy.experiment.unfinished import HOST
from dentropy.model import fingerprint
from dentropy.rollouts import sampling

FILES = [
    *("contributions.png", "delta_entropy.png", "report.html"),
    *("results.json", "rollouts.csv", "rollouts.parquet", "weights.png"),
]


@pytest.fixture(autouse=True)
def passed(tmp_path, monkeypatch):
    """The passes are done in no time: their result is a run made once. In an empty folder."""
    monkeypatch.setattr(probe, "probe", lambda *_, **__: small_run())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_probe(place):
    """Run `dentropy probe` with this --out."""

    def run(out, rollouts=place / "rollouts.jsonl"):
        files = ["--policy", f"{place}/before", "--rollouts", str(rollouts), "--direction", f"{place}/v.safetensors"]
        return main(["probe", *files, "--out", str(out)])

    return run


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def failing(function, times):
    """The function, which fails the first so many times as on a full disk."""
    left = [full_disk] * times

    def called(*arguments, **options):
        return (left.pop() if left else function)(*arguments, **options)

    return called


@pytest.mark.parametrize("out", [".", "link", "empty", "a" * 240, "deep/er", os.fsdecode(b"r\xff")])
def test_every_place_that_can_hold_a_run_gets_it(out, run_probe, capsys):
    if out != ".":
        Path("empty").mkdir()
        Path("link").symlink_to("empty")
    assert run_probe(out) == 0
    assert names(out) == FILES
    printed = capsys.readouterr().out
    assert "measured ± SE" in printed and f"Files in {out}: ".encode("utf-8", "backslashreplace").decode() in printed


def test_the_policy_is_hashed_twice_in_all(run_probe, monkeypatch):
    small_run()  # by passes over a policy of its own
    hashed, counted = fingerprint.parameter_fingerprints, []
    monkeypatch.setattr(fingerprint, "parameter_fingerprints", lambda model: (counted.append(1), hashed(model))[1])
    assert run_probe("run") == 0 and len(counted) == 2


def test_a_name_that_is_too_long_is_refused_before_the_passes(run_probe, capsys, monkeypatch):
    monkeypatch.setattr(probe, "probe", None)
    assert run_probe("a" * 256) == 2
    assert "too long" in capsys.readouterr().err and names() == []


class TestKeptElsewhere:
    def kept(self, capsys, folder):
        out, err = capsys.readouterr()
        assert "measured ± SE" in out
        assert err.startswith("dentropy: ") and err.count("\n") == 1
        assert f"what was computed is in {folder}" in err
        assert names(folder) == FILES and run_folder.load(folder)["n_sequences"] == 32
        return err

    def test_a_folder_taken_meanwhile(self, run_probe, tmp_path, capsys, monkeypatch):
        def meanwhile(*_, **__):
            Path("run").mkdir()
            Path("run/notes.txt").write_text("mine")
            return small_run()

        monkeypatch.setattr(probe, "probe", meanwhile)
        assert run_probe("run") == 2
        assert "run exists and is not empty" in self.kept(capsys, tmp_path / "dentropy-run-1")
        assert names("run") == ["notes.txt"]

    def test_a_disk_that_fills_up(self, run_probe, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(json, "dump", failing(json.dump, 1))
        assert run_probe("run") == 2
        assert "No space left on device" in self.kept(capsys, tmp_path / "dentropy-run-1")
        assert names() == ["dentropy-run-1"]

    def test_a_disk_that_is_full_everywhere_near(self, run_probe, tmp_path_factory, capsys, monkeypatch):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
        monkeypatch.setattr(json, "dump", failing(json.dump, 2))
        assert run_probe("run") == 2
        self.kept(capsys, elsewhere / "dentropy-run-1")
        assert names() == []

    def test_no_place_at_all_leaves_the_summary(self, run_probe, capsys, monkeypatch):
        monkeypatch.setattr(json, "dump", full_disk)
        assert run_probe("run") == 2
        out, err = capsys.readouterr()
        assert "measured ± SE" in out and "nor is there another place" in err and names() == []

    def test_the_demo_takes_the_next_number(self, monkeypatch, capsys):
        def meanwhile(seed):
            Path("dentropy-demo-1").mkdir()
            return small_run()

        monkeypatch.setattr("dentropy.demo.run.run", meanwhile)
        assert main(["demo"]) == 0
        assert names("dentropy-demo-2") == FILES and names("dentropy-demo-1") == []


class TestReport:
    def test_a_bug_in_it_takes_nothing_with_it_and_is_shown_as_one(self, run_probe, capsys, monkeypatch):
        monkeypatch.setattr(page, "html", lambda *_: {}["missing"])
        with pytest.raises(run_folder.ViewsFailedError, match="run is saved without report.html: KeyError: 'missing'"):
            run_probe("run")
        assert names("run") == [name for name in FILES if name != "report.html"]
        assert "measured ± SE" in capsys.readouterr().out

    def test_a_disk_that_is_full_by_then_is_one_line(self, run_probe, capsys, monkeypatch):
        monkeypatch.setattr(page, "html", full_disk)
        assert run_probe("run") == 2
        assert names("run") == [name for name in FILES if name != "report.html"]
        out, err = capsys.readouterr()
        assert "measured ± SE" in out and err.count("\n") == 1 and "run is saved without report.html" in err


class TestTerminal:
    @pytest.mark.parametrize("encoding, errors", [("cp1252", "strict"), ("ascii", "surrogateescape")])
    def test_any_encoding_is_printed_to(self, encoding, errors, run_probe, monkeypatch):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run_probe("run") == 0
        assert main(["show", "run"]) == 0
        terminal.flush()
        assert b"Slope of the entropy at \\u03b7 = 0" in terminal.buffer.getvalue()
        assert terminal.errors == errors

    def test_a_pipe_that_is_closed_does_not_lose_the_run(self, run_probe, monkeypatch):
        class Closed(io.StringIO):
            def write(self, text):
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        monkeypatch.setattr(sys, "stdout", Closed())
        assert run_probe("run") == 2
        assert names("run") == FILES

    def test_names_that_are_not_utf8_are_written_by_their_code(self, place, run_probe):
        rollouts = Path(os.fsdecode(b"r\xff.jsonl"))
        rollouts.write_bytes((place / "rollouts.jsonl").read_bytes())
        assert run_probe("run", rollouts) == 0
        assert run_folder.load("run")["source"]["rollouts"] == "r\\udcff.jsonl"

    def test_ctrl_c_is_one_line(self, run_probe, capsys, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(probe, "probe", interrupted)
        assert run_probe("run") == 130
        assert capsys.readouterr() == ("", "dentropy: interrupted\n") and names() == []


class TestSample:
    def sample(self, place, out):
        files = ["--policy", f"{place}/before", "--prompts", f"{place}/prompts.jsonl", "--out", out]
        return main(["sample", *files, "--per-prompt", "2", "--max-new-tokens", "3"])

    def test_a_file_that_appeared_meanwhile_is_kept_and_so_are_the_rollouts(self, place, capsys, monkeypatch):
        draw = sampling.sample

        def meanwhile(*arguments, **options):
            Path("r.jsonl").write_text("work of another run\n")
            return draw(*arguments, **options)

        monkeypatch.setattr(sampling, "sample", meanwhile)
        assert self.sample(place, "r.jsonl") == 2
        assert Path("r.jsonl").read_text() == "work of another run\n"
        kept = "dentropy-rollouts-1.jsonl"
        assert names() == [kept, "r.jsonl"] and len(Path(kept).read_text().splitlines()) == 6
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "r.jsonl exists, expected a new file; what was computed is in" in err

    def test_a_long_name(self, place):
        assert self.sample(place, "a" * 255) == 0
        assert names() == ["a" * 255]

    def test_what_a_dead_run_left_is_removed(self, place):
        with subprocess.Popen([sys.executable, "-c", ""]) as dead:
            dead.wait()
        Path(f".dentropy-{HOST}-{dead.pid}-0.unfinished").write_text("half of it")
        assert self.sample(place, "r.jsonl") == 0
        assert names() == ["r.jsonl"]
