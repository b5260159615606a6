"""A run folder read back: what `ProbeResult.save` wrote, without the policy and the rollouts that made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dentropy.doors import regular_file, third_party
from dentropy.experiment import run_folder
from dentropy.experiment.glance import changes_table, rollouts_of
from dentropy.experiment.summary import summary
from dentropy.shown import data_frame, line


@dataclass(frozen=True, eq=False, repr=False)
class SavedRun:
    """A run of this version or of an earlier one; `ProbeResult.load` makes it. Tables are read when asked for.

    Attributes:
        folder: Where it is.
        content: Of results.json, as results.md describes it: entropies in nats per token, slopes in nats per token per
            unit of η.

    Example:
        >>> from dentropy import ProbeResult
        >>> ProbeResult.load("no-such-folder")
        Traceback (most recent call last):
        ValueError: no-such-folder: not a run folder, it holds no results.json
    """

    folder: Path
    content: dict

    def __repr__(self) -> str:
        date = (self.content.get("provenance") or {}).get("date")
        return line(self, str(self.folder), date, rollouts_of(self.content))

    def _repr_html_(self) -> str:
        """Prediction and measurement at every η, for a notebook."""
        return changes_table(self.content)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of rollouts.parquet (of rollouts.csv in older runs), [S] each, as `ProbeResult.columns` gives
        them: int64 and float64, bit for bit.

        Raises:
            ValueError: Where the file is missing, is none of ours, or has another number of rows than results.json
                says.
        """
        path = self.folder / run_folder.ROLLOUTS
        if not path.exists() and (self.folder / run_folder.ROLLOUTS_TEXT).exists():
            path = self.folder / run_folder.ROLLOUTS_TEXT
        return self._table(path, "the table of this run's rollouts", self.content["n_sequences"])

    def update_tokens(self) -> dict[str, np.ndarray] | None:
        """The columns of update_tokens.parquet, one entry per token of the update's rollouts; None for a run without.

        Raises:
            ValueError: As `columns`.
        """
        entry = self.content.get("update_attribution")
        if entry is None:
            return None
        return self._table(self.folder / run_folder.UPDATE_TOKENS, "the shares of this run's update", entry["n_tokens"])

    def to_pandas(self):
        """`columns` as a pandas DataFrame. ImportError without pandas."""
        return data_frame(self.columns())

    def summary(self) -> str:
        """The result as a text to read, as `dentropy show` prints it."""
        return summary(self.content)

    @staticmethod
    def _table(path: Path, expected: str, n_rows: int) -> dict[str, np.ndarray]:
        path = regular_file(path, expected)
        with third_party(f"{path}: cannot be read", "a table as dentropy writes it"):
            from pyarrow import csv, parquet

            table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
        if table.num_rows != n_rows:
            raise ValueError(f"{path}: {table.num_rows} rows, expected {n_rows} as {run_folder.RESULTS} says")
        return {name: column.to_numpy() for name, column in zip(table.column_names, table.columns, strict=True)}
