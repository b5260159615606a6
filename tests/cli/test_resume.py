"""A probe that is killed, interrupted or short of room goes on where it was, to the same bytes."""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import completed
from matplotlib.figure import Figure

from dentropy import Policy
from dentropy.cli import main
from dentropy.cli import probe as probe_command
from dentropy.experiment import figures, resumable
from dentropy.experiment.resumable import ROWS, UnfinishedRun
from dentropy.passes.finished import Finished
from dentropy.stats.tables import TokenStats

# Three microbatches or so to a pass, and few passes.
OPTIONS = "--direction v.safetensors --etas 1e-3 --token-budget 100"
MADE = "--update-rollouts rewarded.jsonl --step-size 1e-3 --etas 1e-3 --token-budget 100"
needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="a process with a card cannot be forked")


def command(out, options=OPTIONS):
    return completed(f"probe {options} --out {out} --device cpu")


@pytest.fixture(scope="module", autouse=True)
def plain_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", dict.fromkeys(figures.FIGURES, lambda *_: Figure(figsize=(1, 1))))
        yield


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    """By options: the files of a run that nothing disturbed, and in how many writes it was kept; one that kept
    nothing gets the same."""
    write = UnfinishedRun.write

    @cache
    def run(options):
        folder, writes = tmp_path_factory.mktemp("undisturbed"), []
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            patch.setattr(UnfinishedRun, "write", lambda *arguments: (writes.append(1), write(*arguments)))
            assert main(command(folder / "run", options)) == 0
            patch.setattr(probe_command, "_store", lambda *_: nullcontext())
            assert main(command(folder / "without", options)) == 0
        assert files(folder / "without") == files(folder / "run")
        return files(folder / "run"), len(writes)

    return run


def files(out):
    """The bytes of the tables, and all results but when and how they were computed."""
    assert not list(Path(out).parent.glob("*unfinished*"))
    results = json.loads((Path(out) / "results.json").read_text())
    del results["provenance"]
    return {name: (Path(out) / name).read_bytes() for name in ("rollouts.csv", "rollouts.parquet")} | results


def at_write(patch, number, happens, *, after=True):
    """`happens()` at the so-many-th write of finished microbatches, after it or in the middle of it."""
    left, write = [number], UnfinishedRun.write

    def counted(run, *arguments):
        left[0] -= 1
        if left[0] == 0 and not after:
            run._db.set_trace_callback(lambda sql: happens() if sql == "COMMIT" else None)
        write(run, *arguments)
        if left[0] == 0:
            happens()

    patch.setattr(UnfinishedRun, "write", counted)


def in_a_child(run, said):
    """The exit status of `run()` in another process, minus the signal where one ended it; stderr goes to `said`."""
    child = os.fork()
    if child == 0:
        try:
            with open(said, "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
                status = run()
            os._exit(status)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.parametrize(
    "options", [OPTIONS, pytest.param(MADE, marks=pytest.mark.slow)], ids=["direction", "update rollouts"]
)
def test_killed_again_and_again(options, undisturbed, tmp_path, monkeypatch):
    want, writes = undisturbed(options)
    out, ran = tmp_path / "run", 0
    for number, after in ((2, False), (writes // 2, True)):

        def killed(number=number, after=after):
            at_write(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)
            return main([*command(out, options), "--resume"])

        assert in_a_child(killed, tmp_path / "said") == -signal.SIGKILL
        assert not out.exists()
        ran += number - (not after)
    counted, write = [], UnfinishedRun.write
    monkeypatch.setattr(UnfinishedRun, "write", lambda *arguments: (counted.append(1), write(*arguments)))
    assert main([*command(out, options), "--resume"]) == 0
    assert files(out) == want
    assert len(counted) == writes - ran  # nothing that was finished is run again


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("options", [OPTIONS, MADE], ids=["direction", "update rollouts"])
def test_fifty_kills_at_random_moments(options, undisturbed, tmp_path):
    want, _ = undisturbed(options)
    generator, kills, runs = random.Random(0), 0, 0
    start = time.monotonic()
    assert in_a_child(lambda: main(command(tmp_path / "timed", options)), tmp_path / "said") == 0
    whole = time.monotonic() - start
    while kills < 50:
        out = tmp_path / f"run-{runs}"
        for _ in range(3):
            child = os.fork()
            if child == 0:
                with open(os.devnull, "w") as sys.stdout:
                    os._exit(main([*command(out, options), "--resume"]))
            time.sleep(generator.uniform(0.05, 0.6) * whole)
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            kills += status == -signal.SIGKILL
            if status == 0:
                break
        if not out.exists():
            assert main([*command(out, options), "--resume"]) == 0
        assert (out / "rollouts.csv").read_bytes() == want["rollouts.csv"]
        shutil.rmtree(out)
        runs += 1


class TestInterrupted:
    def interrupted(self, tmp_path, monkeypatch, capsys, status=130, how=signal.SIGINT):
        with monkeypatch.context() as patch:
            at_write(patch, 3, lambda: os.kill(os.getpid(), how))
            assert main(command(tmp_path / "run")) == status
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        folder = tmp_path / "run.unfinished"
        assert f"interrupted; what is finished is kept in {folder}: the same command with --resume goes on" in err
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        return folder

    def test_one_line_says_how_to_go_on(self, tmp_path, monkeypatch, capsys):
        self.interrupted(tmp_path, monkeypatch, capsys, 143, signal.SIGTERM)
        assert main(command(tmp_path / "run")) == 2
        assert "--out: an unfinished run is kept in" in capsys.readouterr().err

    def test_another_run_is_refused_by_what_is_in_it(self, place, undisturbed, tmp_path, monkeypatch, capsys):
        folder = self.interrupted(tmp_path, monkeypatch, capsys)
        lines = (place / "rollouts.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "fewer.jsonl").write_text("".join(lines[:-1]))
        same = tmp_path / "copy.jsonl"
        same.write_text("".join(lines))
        other = f"--rollouts {tmp_path}/fewer.jsonl --policy after --token-budget 50 --step-size 2e-3"
        assert main([*command(tmp_path / "run", f"{OPTIONS} {other}"), "--resume"]) == 2
        said = capsys.readouterr().err
        assert f"--resume: the unfinished run in {folder} has another policy (" in said
        for named in (
            "rollouts (",
            "direction's step size (0.001, now 0.002)",
            "step_size (",
            "token_budget (100, now",
        ):
            assert f", {named}" in said
        with sqlite3.connect(folder / ROWS) as rows:  # as after a fault of the disk
            rows.execute("UPDATE microbatch SET stats = zeroblob(length(stats))")
        rows.close()
        # The path does not count, and what is damaged is run again.
        assert main([*command(tmp_path / "run", f"{OPTIONS} --rollouts {same}"), "--resume"]) == 0
        assert files(tmp_path / "run")["rollouts.csv"] == undisturbed(OPTIONS)[0]["rollouts.csv"]

    def test_another_reference_of_the_penalty_is_refused_and_its_path_does_not_count(
        self, place, tmp_path, monkeypatch, capsys
    ):
        shutil.copytree(place / "after", tmp_path / "copy")

        def said(reference, status, *more):
            with monkeypatch.context() as patch:
                at_write(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
                options = f"{MADE} --loss-kl 0.1 --loss-kl-reference {reference}"
                assert main([*command(tmp_path / "run", options), *more]) == status
            return capsys.readouterr().err

        said("after", 130)
        assert "has another loss_kl_reference (" in said("before", 2, "--resume")
        assert "interrupted; what is finished" in said(tmp_path / "copy", 130, "--resume")

    def test_nothing_finished_leaves_nothing(self, tmp_path, monkeypatch, capsys):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(Policy, "score", interrupted)
        assert main(command(tmp_path / "run")) == 130
        assert capsys.readouterr() == ("", "dentropy: interrupted\n") and list(tmp_path.iterdir()) == []

    @needs_fork
    def test_a_full_disk(self, undisturbed, tmp_path):
        """The limit on the size of a file, which the kernel enforces, stands for it."""

        def short():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            return main(command(tmp_path / "run"))

        assert in_a_child(short, tmp_path / "said") == 2
        said = (tmp_path / "said").read_text()
        assert "Traceback" not in said and said.endswith("was written before is kept, and --resume goes on\n")
        assert main([*command(tmp_path / "run"), "--resume"]) == 0
        assert files(tmp_path / "run") == undisturbed(OPTIONS)[0]


@pytest.mark.parametrize("out", ["x" * 255, "new/folder", "."])
def test_wherever_the_run_goes(out, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    folder = resumable.unfinished_folder(Path(out))
    assert len(folder.name) <= 255
    run = UnfinishedRun(folder, {"policy": "one"})
    run.close(done=False)
    assert not folder.exists()


class TestStore:
    def test_a_second_process_is_refused(self, tmp_path):
        run = UnfinishedRun(tmp_path, {"policy": "one"})
        with pytest.raises(ValueError, match="^out: another process writes to"):
            UnfinishedRun(tmp_path, {"policy": "one"})
        run.close(done=True)

    def test_a_disk_that_becomes_read_only(self, tmp_path):
        """As when the kernel remounts one after an error; SQLite says the same of its own such state."""
        run = UnfinishedRun(tmp_path, {"policy": "one"})
        first, second = ({key: Finished(TokenStats(torch.ones(2), torch.ones(2)), 7)} for key in "ab")
        run.write("walk", first)
        run._db.execute("PRAGMA query_only = ON")
        with pytest.raises(OSError, match=r"readonly.*; what was written before is kept, and --resume goes on"):
            run.write("walk", second)
        run.close(done=False)
        again = UnfinishedRun(tmp_path, {"policy": "one"})
        assert list(again.read("walk")) == ["a"]
        again.close(done=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that nobody can write to is taken from Linux")
@pytest.mark.parametrize("words", [command("/proc/new"), completed("sample --out /proc/new")], ids=["probe", "sample"])
def test_a_read_only_folder_is_refused_before_any_work(words, monkeypatch, capsys):
    monkeypatch.setattr(Policy, "from_pretrained", None)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--out: /proc/new cannot be written" in err
