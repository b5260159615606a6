"""The folder on disk: whole or not at all, wherever it can be, and nothing computed is lost with it."""

import errno
import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from dentropy.experiment import figures, run_folder
from dentropy.experiment.report import page
from dentropy.experiment.run_folder import ViewsFailedError, check_out, load

FILES = [
    *("contributions.png", "delta_entropy.png", "report.html"),
    *("results.json", "rollouts.csv", "rollouts.parquet", "weights.png"),
]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_folder_holds_what_it_should_and_nothing_is_left_beside_it(run):
    assert names(run) == FILES
    assert names(run.parent) == ["run"]


def test_more_rollouts_than_text_is_good_for_are_in_the_table_alone(result, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "MOST_AS_TEXT", len(result.base) - 1)
    out = result.save(tmp_path / "run")
    assert names(out) == [name for name in FILES if name != "rollouts.csv"]
    rows = pd.read_parquet(out / "rollouts.parquet")
    assert len(rows) == len(result.base)


def test_load_reads_what_was_saved(run, result):
    assert load(run) == result.content


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "not a run folder, it holds no results.json"),
        ("{", "results.json: broken JSON"),
        ("[]", "schema_version is None, this version reads 1 to 3"),
        ('{"schema_version": 4}', "schema_version is 4, this version reads 1 to 3"),
    ],
)
def test_other_folders_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


class TestWhere:
    """All these are found out before the passes, and what is accepted then can be filled after them."""

    def save(self, result, out):
        check_out(out)
        assert result.save(out) == out
        assert names(out) == FILES

    def test_the_folder_one_is_in(self, result, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        self.save(result, run_folder.Path("."))

    def test_a_link_to_an_empty_folder(self, result, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        self.save(result, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == FILES

    def test_an_empty_folder_that_cannot_be_renamed_over(self, result, tmp_path, monkeypatch):
        """As a mount point: it stays the folder it was."""
        out = tmp_path / "mounted"
        out.mkdir()
        before = out.stat().st_ino
        self.save(result, out)
        assert out.stat().st_ino == before

    def test_a_name_as_long_as_names_can_be(self, result, tmp_path):
        self.save(result, tmp_path / ("a" * 255))

    def test_a_name_that_is_not_utf8(self, result, tmp_path):
        self.save(result, tmp_path / os.fsdecode(b"r\xff"))

    @pytest.mark.parametrize(
        "out, message",
        [
            (".", "exists and is not empty"),
            ("file", "exists and is not a folder"),
            ("dangling", "exists and is not a folder"),
            ("file/run", "cannot be written"),
            ("a" * 256, "cannot be written.*too long"),
            ("b" * 256 + "/run", "cannot be written.*too long"),
        ],
    )
    def test_others_are_refused_and_left_as_they_are(self, tmp_path, out, message):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "dangling").symlink_to("nowhere")
        with pytest.raises(ValueError, match=f"^out: .*{message}"):
            check_out(tmp_path / out)
        assert names(tmp_path) == ["dangling", "file"] and (tmp_path / "file").read_text() == "mine"

    def test_a_name_that_the_file_system_does_not_take_is_found_out_by_trying(self, tmp_path, monkeypatch):
        mkdir = run_folder.Path.mkdir

        def picky(path, *arguments, **options):
            return full_disk() if path.name == "run" else mkdir(path, *arguments, **options)

        monkeypatch.setattr(run_folder.Path, "mkdir", picky)
        with pytest.raises(ValueError, match="run cannot be written"):
            check_out(tmp_path / "run")

    def test_trying_leaves_nothing(self, tmp_path):
        check_out(tmp_path / "deep" / "deeper" / "run")
        assert names(tmp_path) == []


class TestFailures:
    def test_a_disk_that_fills_up_leaves_nothing(self, result, tmp_path, monkeypatch):
        monkeypatch.setattr(json, "dump", full_disk)
        for out in (tmp_path / "above" / "run", tmp_path):
            with pytest.raises(OSError, match="No space left"):
                result.save(out)
            assert names(tmp_path) == []

    def test_a_disk_that_fills_up_while_files_move_leaves_nothing(self, result, tmp_path, monkeypatch):
        rename = run_folder.Path.rename

        def full_for_results(path, target):
            if path.name != "results.json":
                return rename(path, target)
            assert set(names(tmp_path)) > set(FILES) - {"results.json"}, "it comes last: then the folder is a run"
            return full_disk()

        monkeypatch.setattr(run_folder.Path, "rename", full_for_results)
        with pytest.raises(OSError, match="No space left"):
            result.save(tmp_path)
        assert names(tmp_path) == []

    @pytest.mark.parametrize("broken, lost", [("report", "report.html"), ("figure", "weights.png")])
    def test_a_report_or_figure_that_fails_takes_nothing_with_it(self, result, tmp_path, monkeypatch, broken, lost):
        def fail(*_):
            raise KeyError("a bug")

        if broken == "report":
            monkeypatch.setattr(page, "html", fail)
        else:
            monkeypatch.setitem(figures.FIGURES, lost, fail)
        with pytest.raises(ViewsFailedError, match=f"{lost}: KeyError: 'a bug'") as caught:
            result.save(tmp_path / "run")
        assert isinstance(caught.value.__cause__, KeyError)
        assert names(tmp_path / "run") == [name for name in FILES if name != lost]
        assert load(tmp_path / "run") == result.content

    def test_a_tokenizer_that_fails_takes_only_the_report_with_it(self, result, tmp_path):
        class Broken:
            def decode(self, ids):
                raise RuntimeError("no such token")

        with pytest.raises(ViewsFailedError, match="report.html: RuntimeError: no such token"):
            result.save(tmp_path / "run", Broken())
        assert names(tmp_path / "run") == [name for name in FILES if name != "report.html"]

    def test_a_folder_taken_meanwhile_keeps_what_it_holds(self, result, tmp_path, monkeypatch):
        """In the last moment, after the check."""
        html = page.html

        def meanwhile(*arguments):
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "notes.txt").write_text("mine")
            return html(*arguments)

        monkeypatch.setattr(page, "html", meanwhile)
        with pytest.raises(OSError, match="not empty"):
            result.save(tmp_path / "run")
        assert names(tmp_path / "run") == ["notes.txt"] and names(tmp_path) == ["run"]


class TestLeftBehind:
    """A process that was killed while it wrote leaves its temporary folder; the next run there removes it."""

    CODE = """
import contextlib, os, signal, sys
from dentropy.experiment import run_folder
with contextlib.ExitStack() as stack:
    for out in sys.argv[2:]:
        folder = stack.enter_context(run_folder._unfinished(run_folder.Path(out)))
        (folder / "rollouts.csv").write_text("half of it")
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print(flush=True)
    sys.stdin.read()
"""

    def process(self, what, *outs):
        command = [sys.executable, "-c", self.CODE, what, *map(str, outs)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def test_that_of_a_dead_process_is_removed(self, result, tmp_path):
        empty = tmp_path / "empty"
        empty.mkdir()
        with self.process("killed", tmp_path / "run", empty) as killed:
            killed.wait()
        assert len(names(tmp_path)) == 2 and len(names(empty)) == 1
        check_out(empty), check_out(tmp_path / "run")
        assert names(tmp_path) == ["empty"] and names(empty) == []

    def test_that_of_a_living_one_is_left_alone(self, result, tmp_path):
        with self.process("waits", tmp_path / "run") as waits:
            waits.stdout.readline()
            (left,) = names(tmp_path)
            result.save(tmp_path / "run")
            assert names(tmp_path) == [left, "run"]
            waits.stdin.close()
        assert names(tmp_path) == ["run"]
