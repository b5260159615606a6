"""A run that goes on where it was killed: the folder of an unfinished one, and what must be the same for it to go on.

The folder stands beside the run folder until that is written. `rows.sqlite` in it holds the statistics of every
finished microbatch, or the rollouts of every finished part of a draw, each round in one transaction that is flushed to
the disk, so that neither a killed process nor a full disk takes what was there. Where the update is made from rollouts,
`gradient.safetensors` holds their gradient.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dentropy.experiment.run_folder import RESULTS, UNFINISHED
from dentropy.model.fingerprint import WeightsChangedError, fingerprint
from dentropy.passes.finished import Finished
from dentropy.stats.tables import TokenStats

ROWS, GRADIENT = "rows.sqlite", "gradient.safetensors"
LONGEST = 255 - len(UNFINISHED)  # bytes of a name that leave room for it
TABLES = """
    CREATE TABLE IF NOT EXISTS identity (part TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS microbatch (
        walk TEXT, rollouts TEXT, token_budget INT, stats BLOB, sha256 BLOB, PRIMARY KEY (walk, rollouts)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS drawn (part INTEGER PRIMARY KEY, responses BLOB, random_state BLOB, sha256 BLOB);
"""


def unfinished_folder(out: Path) -> Path:
    """Where a run is kept until `out` is written: inside where that exists, as a mount point does, else beside it."""
    if out.is_dir():
        return out / UNFINISHED
    name = out.name if len(os.fsencode(out.name)) <= LONGEST else hashlib.sha256(os.fsencode(out.name)).hexdigest()
    return out.absolute().with_name(name + UNFINISHED)


def check_unfinished(out: Path, resume: bool) -> None:
    """ValueError where an unfinished run is kept for `out` that is not to be resumed."""
    folder = unfinished_folder(out)
    if not resume and (folder / ROWS).exists():
        raise ValueError(
            f"out: an unfinished run is kept in {folder}, expected --resume, which goes on with it, or no such folder"
        )


class UnfinishedRun:
    """The store of one run: of its passes (`passes.finished.Store`), or of its draw (`rollouts.sampling.DrawStore`)."""

    def __init__(self, folder: Path, identity: Mapping[str, str]):
        self.folder = folder
        self._made = [above for above in folder.absolute().parents if not above.exists()]
        with self._on_disk():
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / ROWS, timeout=0, isolation_level=None, check_same_thread=False)
            try:
                # One process at a time; and so write-ahead logging needs no shared memory.
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.executescript(TABLES)
                self._check(identity)
            except BaseException:
                self._db.close()
                raise

    @property
    def is_empty(self) -> bool:
        rows = self._db.execute("SELECT 1 FROM microbatch UNION ALL SELECT 1 FROM drawn LIMIT 1").fetchone()
        return rows is None and not (self.folder / GRADIENT).exists()

    def read(self, walk: str) -> dict[str, Finished]:
        """What is whole; a row that is not, as after a fault of the disk, counts as not there."""
        found = {}
        with self._on_disk():
            rows = self._db.execute(
                "SELECT rollouts, token_budget, stats, sha256 FROM microbatch WHERE walk = ?", (walk,)
            )
            for rollouts, token_budget, stats, digest in rows:
                if stats is None:
                    found[rollouts] = Finished(None, token_budget)
                elif hashlib.sha256(stats).digest() == digest:
                    found[rollouts] = Finished(_unpacked(stats), token_budget)
        return found

    def write(self, walk: str, finished: Mapping[str, Finished]) -> None:
        rows = []
        for rollouts, (stats, token_budget) in finished.items():
            packed = None if stats is None else _packed(stats)
            rows.append((walk, rollouts, token_budget, packed, packed and hashlib.sha256(packed).digest()))
        with self._on_disk():
            self._insert("microbatch VALUES (?, ?, ?, ?, ?)", rows)

    def read_drawn(self, part: int) -> tuple[list[list[int]], Tensor] | None:
        """None where it is not there, or not whole."""
        with self._on_disk():
            row = self._db.execute(
                "SELECT responses, random_state, sha256 FROM drawn WHERE part = ?", (part,)
            ).fetchone()
        if row is None or hashlib.sha256(row[0] + row[1]).digest() != row[2]:
            return None
        return json.loads(row[0]), torch.frombuffer(bytearray(row[1]), dtype=torch.uint8)

    def write_drawn(self, part: int, responses: list[list[int]], state: Tensor) -> None:
        packed, state = json.dumps(responses).encode(), state.cpu().numpy().tobytes()
        with self._on_disk():
            row = (part, packed, state, hashlib.sha256(packed + state).digest())
            self._insert("drawn VALUES (?, ?, ?, ?)", [row])

    def read_gradient(self) -> list[Tensor] | None:
        """The tensors of `write_gradient`; None where they are not there, or not whole."""
        from safetensors import safe_open

        path = self.folder / GRADIENT
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
            digest = (file.metadata() or {}).get("sha256")
        return tensors if digest == _digest(tensors) else None

    def write_gradient(self, tensors: Sequence[Tensor]) -> None:
        from safetensors.torch import save_file

        tensors = [tensor.detach().cpu().contiguous() for tensor in tensors]
        written = self.folder / f"{GRADIENT}.part"
        with self._on_disk():
            save_file({str(i): x for i, x in enumerate(tensors)}, written, {"sha256": _digest(tensors)})
            with open(written, "rb") as file:
                os.fsync(file.fileno())
            written.replace(self.folder / GRADIENT)

    def close(self, done: bool) -> None:
        """With the folder removed where the run is `done`, or nothing is in it. A second call does nothing."""
        if self._db is None:
            return
        with self._on_disk():
            empty = self.is_empty
            self._db.close()
        self._db = None
        if done or empty:
            shutil.rmtree(self.folder, ignore_errors=True)
            for above in self._made:
                with suppress(OSError):  # something is in it, as what the run became
                    above.rmdir()

    def _check(self, identity: Mapping[str, str]) -> None:
        found = dict(self._db.execute("SELECT part, value FROM identity"))
        if not found:
            self._insert("identity VALUES (?, ?)", identity.items())
            return
        other = [part for part in [*identity, *(set(found) - set(identity))] if identity.get(part) != found.get(part)]
        if other:
            said = ", ".join(f"{part} ({_short(found.get(part))}, now {_short(identity.get(part))})" for part in other)
            raise ValueError(
                f"resume: the unfinished run in {self.folder} has another {said}; expected the same as then, or "
                "another --out"
            )

    def _insert(self, into: str, rows: Iterable[tuple]) -> None:
        """All rows or none."""
        self._db.execute("BEGIN")
        try:
            self._db.executemany(f"INSERT OR REPLACE INTO {into}", rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """What goes wrong with the files, in words that say where."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ValueError(f"out: another process writes to {self.folder}, expected one at a time") from error
            raise OSError(f"{self.folder}: {error}; what was written before is kept, and --resume goes on") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"resume: {self.folder / ROWS}: {error}, expected rows of a run (remove it)") from error


@contextmanager
def unfinished_run(out: Path, identity: Mapping[str, str]) -> Iterator[UnfinishedRun]:
    """The store of the run that is to become `out`, made where there is none; removed once `out` is written.

    KeyboardInterrupt leaves with the way on.

    Raises:
        ValueError: where the store is of a run of another identity, naming what differs, or in use.
        OSError: where it cannot be written.
    """
    run = UnfinishedRun(unfinished_folder(out), identity)
    try:
        yield run
    except KeyboardInterrupt as error:
        if run.is_empty:
            raise
        raise type(error)(
            f"interrupted; what is finished is kept in {run.folder}: the same command with --resume goes on"
        ) from None
    except WeightsChangedError:
        run.close(done=True)  # there is nothing in it to go on from
        raise
    finally:
        run.close(done=out.is_file() or (out / RESULTS).exists())


def _packed(stats: TokenStats) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: x.numpy() for name, x in stats._asdict().items() if x is not None})
    return buffer.getvalue()


def _unpacked(packed: bytes) -> TokenStats:
    with np.load(io.BytesIO(packed), allow_pickle=False) as columns:
        return TokenStats(**{name: torch.from_numpy(columns[name]) for name in columns.files})


def _digest(tensors: Sequence[Tensor]) -> str:
    return fingerprint((str(i), tensor) for i, tensor in enumerate(tensors))


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) < 64 else value[:8]
