"""Arrays that may be larger than memory, and what is read and summed through them."""

import errno
import json
import os
import tempfile
import tracemalloc

import numpy as np
import pytest
import torch

from dentropy import PackedBatch, large


@pytest.fixture
def mapped(monkeypatch, tmp_path):
    """Everything counts as large; the folder for temporary files."""
    monkeypatch.setattr(large, "IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_large_arrays_lie_in_a_file_that_nobody_has_to_remove(mapped):
    found = large.empty(1000, np.float32)
    tensor = torch.from_numpy(found)
    tensor[:] = torch.arange(1000)
    assert found[999] == 999 and found.dtype == np.float32 and list(mapped.iterdir()) == []
    tracemalloc.start()
    try:
        kept = large.empty(10**6, np.float64)
        assert tracemalloc.get_traced_memory()[1] < 10**5 and len(kept) == 10**6
    finally:
        tracemalloc.stop()


def test_a_full_disk_is_named_before_anything_is_written(mapped, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"{mapped}: No space left on device, expected 1.0 GiB .*TMPDIR names another"):
        large.empty(2**27, np.float64)


def test_a_tape_keeps_what_is_added_wherever_a_block_ends(monkeypatch):
    monkeypatch.setattr(large.Tape, "SMALLEST", 4)
    tape, added = large.Tape(np.int32), [[1, 2, 3], [], [4, 5], list(range(40)), [6]]
    kept = [tape.add(values) for values in added]
    assert [list(values) for values in kept] == added


@pytest.mark.parametrize("columns", [("prompt_ids", "response_ids"), ("prompt_ids", "completion_ids", "sampler_logp")])
def test_reading_costs_a_few_bytes_for_each_token(columns, mapped, tmp_path):
    """As lists of integers it was more than sixty."""
    rng, rollouts, length = np.random.default_rng(0), 40, 500
    path = tmp_path / "rollouts.jsonl"
    rows = []
    for _ in range(rollouts):
        ids = rng.integers(1000, 10**6, (2, length)).tolist()
        rows.append(dict(zip(columns, [*ids, (-rng.random(length)).tolist()], strict=False)) | {"group": 1})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    try:
        batch = PackedBatch.from_jsonl(path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batch.response(7) == rows[7][columns[1]] and batch.prompt(39) == rows[39]["prompt_ids"]
    if len(columns) == 3:
        assert batch.sampler_logp[: 2 * length].tolist() == rows[0][columns[2]] + rows[1][columns[2]]
    assert most < 8 * len(batch.tokens) + 200_000
