"""The run folder on disk: results.json, the rollouts, the report and the figures; `dentropy/results.md` describes them.

Everything is written into a folder under a temporary name and moved to its place at the end: a new folder by one
rename, into an empty one that exists (a mount point, a link, ".") file by file with results.json last.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from dentropy.doors import json_value, third_party
from dentropy.experiment import figures
from dentropy.experiment.report import page
from dentropy.experiment.results_schema import check
from dentropy.experiment.unfinished import remove_left_behind, temporary

SCHEMA_VERSION, KNOWN_VERSIONS = 3, (1, 2, 3)
RESULTS, REPORT = "results.json", "report.html"
ROLLOUTS, ROLLOUTS_TEXT = "rollouts.parquet", "rollouts.csv"
MOST_AS_TEXT = 100_000  # rollouts that are written as text too
UPDATE_TOKENS = "update_tokens.parquet"
UNFINISHED = ".unfinished"  # behind the name of the folder that a run is kept in until its own is written


class ViewsFailedError(RuntimeError):
    """The run is saved but for its report or a figure; the cause is what the first of them failed with."""


def check_out(out: str | Path) -> Path:
    """`out` as a path, if a run folder can be written there, by trying: call it before any work.

    Temporary folders are removed that a process which is dead has left there.

    Raises:
        ValueError: Where `out` is a file or a folder that is not empty, or cannot be made or written into.
    """
    out = Path(out)
    try:
        if out.is_dir():
            remove_left_behind(out)
            if _entries(out):
                raise ValueError(f"out: {out} exists and is not empty, expected a new or an empty folder")
        elif out.exists() or out.is_symlink():
            raise ValueError(f"out: {out} exists and is not a folder, expected a new or an empty one")
        with _unfinished(out):
            if not out.is_dir():
                out.mkdir()
                out.rmdir()
    except OSError as error:
        raise ValueError(f"out: {out} cannot be written, expected a folder that can ({error})") from error
    return out


def save(
    out: str | Path,
    content: dict,
    columns: dict[str, np.ndarray],
    shown: Callable[[], list[dict]],
    update_tokens: dict[str, np.ndarray] | None = None,
    update_shown: Callable[[], list[dict]] = list,
) -> Path:
    """Write the run folder `out`.

    Args:
        out: A new folder, or one that exists and is empty.
        content: Of results.json.
        columns: Of rollouts.parquet and rollouts.csv.
        shown: Gives the rollouts that the report shows token by token, as `report.page.html` takes them.
        update_tokens: Columns of update_tokens.parquet, which is not written without.
        update_shown: As `shown`, of the update's rollouts.

    Returns:
        The folder's path.

    Raises:
        ValueError: As `check_out`.
        OSError: Where results.json or the table of rollouts cannot be written; then nothing is left.
        ViewsFailedError: Where the report or a figure fails: all else is in the folder.
    """
    out = check_out(out)
    with _unfinished(out) as unfinished:
        with open(unfinished / RESULTS, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False, ensure_ascii=False)
            file.write("\n")
        _write_parquet(unfinished / ROLLOUTS, columns)
        if len(columns["rollout"]) <= MOST_AS_TEXT:
            _write_csv(unfinished / ROLLOUTS_TEXT, columns)
        if update_tokens is not None:
            _write_parquet(unfinished / UPDATE_TOKENS, update_tokens)
        failed = _write_views(unfinished, content, columns, shown, update_shown)
        _move(unfinished, out)
    if failed:
        reasons = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failed.items())
        raise ViewsFailedError(f"{out} is saved without {reasons}") from next(iter(failed.values()))
    return out


def load(folder: str | Path) -> dict:
    """The content of results.json in a run folder.

    Raises:
        ValueError: Where the folder, the file or its schema are not those of a finished run.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder}: not a run folder, it holds no {RESULTS}")
    content = json_value(path.read_bytes(), str(path))
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found not in KNOWN_VERSIONS or isinstance(found, bool):
        known = f"{KNOWN_VERSIONS[0]} to {KNOWN_VERSIONS[-1]}"
        raise ValueError(f"{path}: schema_version is {found!r:.40}, this version reads {known}")
    check(content, str(path))
    return content


def _write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def _write_parquet(path: Path, columns: dict[str, np.ndarray]) -> None:
    with third_party(f"{path.name}: cannot be written", "the pyarrow that pip install 'dentropy[probe]' brings"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _write_views(
    folder: Path,
    content: dict,
    columns: dict[str, np.ndarray],
    shown: Callable[[], list[dict]],
    update_shown: Callable[[], list[dict]],
) -> dict[str, Exception]:
    """Write what is made to look at; the errors, by file name, of those that failed.

    They come from the data that is saved beside them, so one that fails must not take these along.
    """

    pictures: dict[str, object] = {}

    def figure(path: Path) -> None:
        drawn = figures.FIGURES[path.name](content, columns)
        drawn.savefig(path, dpi=figures.DPI)
        pictures[path.name] = drawn

    def report(path: Path) -> None:
        path.write_text(page.html(content, shown(), update_shown(), pictures), encoding="utf-8")

    failed: dict[str, Exception] = {}
    for name, write in (dict.fromkeys(figures.FIGURES, figure) | {REPORT: report}).items():
        try:
            write(folder / name)
        except Exception as error:
            (folder / name).unlink(missing_ok=True)
            failed[name] = error
    return failed


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A folder to write into, under a temporary name: inside `out` where that exists, else beside it.

    It is gone at the end, with the folders above that were made for it, unless something is in them by then.
    """
    above = out if out.is_dir() else out.absolute().parent
    made = [folder for folder in (above, *above.parents) if not folder.exists()]
    try:
        above.mkdir(parents=True, exist_ok=True)
        folder = temporary(above)
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for empty in made:
            with suppress(OSError):  # never made, or no longer empty
                empty.rmdir()


def _entries(out: Path) -> list[Path]:
    """What is in `out` beside the run's own unfinished folder."""
    return [path for path in out.iterdir() if path.name != UNFINISHED]


def _move(unfinished: Path, out: Path) -> None:
    """To its place: by one rename, or into the folder that is there, results.json last."""
    if unfinished.parent != out:
        unfinished.rename(out)
        return
    if len(_entries(out)) > 1:
        raise ValueError(f"out: {out} is no longer empty, expected an empty folder")
    moved: list[Path] = []
    try:
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == RESULTS):
            moved.append(path.rename(out / path.name))
    except OSError:
        for path in moved:
            path.unlink()
        raise
