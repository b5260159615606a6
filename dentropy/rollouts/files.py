"""The rows in one file, whatever contains them: JSON lines, a JSON array, Parquet, or what torch.save wrote.

A row comes with where it stands, for errors: file and line, item or row.
"""

from pathlib import Path

from dentropy.doors import json_value, regular_file, saved_by_torch, third_party
from dentropy.rollouts.compact import Compact
from dentropy.rollouts.readers import PARQUET, json_lines

Rows = list[tuple[str, dict]]
SUFFIXES = (".jsonl", ".json", ".parquet", ".pt")
ZIP = b"PK"
READ_AT_ONCE = 1024  # rows of Parquet


def rows_in(path: Path) -> Rows:
    """All rows of a file, told by how it begins, not by its name.

    Raises:
        ValueError: naming the file, and the place in it, for what is none of these and for a file without rows.
    """
    with open(regular_file(path, "a file of rollouts"), "rb") as file:
        start = file.read(64)
    compact = Compact()
    if start.startswith(PARQUET):
        rows = _parquet(path, compact)
    elif start.startswith(ZIP):
        rows = _samples(path)
    elif start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        rows = _array(path)
    else:
        rows = [(where, compact.row(row)) for where, row in json_lines(path)]
    if not rows:
        raise ValueError(f"{path}: no rollouts, expected one JSON object per line")
    return rows


def _array(path: Path) -> Rows:
    items = json_value(path.read_bytes(), str(path), "a JSON array of objects, or JSON lines")
    return _objects(items, f"{path}: item")


def _parquet(path: Path, compact: Compact) -> Rows:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow; pip install 'dentropy[probe]' brings it") from error
    items = []
    with third_party(f"{path}: cannot be read", "a Parquet file"), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(READ_AT_ONCE):
            items += map(compact.row, batch.to_pylist())
    return _objects(items, f"{path}: row")


def _samples(path: Path) -> Rows:
    """Of slime, the only one here that writes with torch.save."""
    expected = "slime's {rollout_id, samples} by torch.save"
    saved = saved_by_torch(path, expected)
    if not isinstance(saved, dict) or not isinstance(saved.get("samples"), list):
        raise ValueError(f"{path}: a {type(saved).__name__} without a list of samples, expected {expected}")
    rows = _objects(saved["samples"], f"{path}: sample")
    return [(where, row | {"rollout_id": saved.get("rollout_id")}) for where, row in rows]


def _objects(items: list, where: str) -> Rows:
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(f"{where} {i + 1}: {type(item).__name__}, expected an object")
        if not all(isinstance(name, str) for name in item):
            raise ValueError(f"{where} {i + 1}: column names that are no text, expected text")
    return [(f"{where} {i + 1}", item) for i, item in enumerate(items)]
