"""The table of rollouts: what it takes for columns, and how tables are joined."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import token_values

from dentropy import SequenceSums, TokenStats, sequence_sums
from dentropy.stats.tables import working_dtype

ENDS = [0, 0, 5, 6, 6, 6, 20, 53, 53]


def table(rows=2, **columns):
    base = dict(
        n_tokens=np.ones(rows),
        logp=-np.ones(rows),
        entropy=np.ones(rows),
        group=np.arange(rows),
        rollout=np.arange(rows),
    )
    return SequenceSums(**base | columns)


def test_concatenate_keeps_every_row_column_and_token():
    stats = token_values(53)
    whole = sequence_sums(stats, ENDS, group=np.arange(8) // 2)
    parts = []
    for low, high in ((0, 3), (3, 3), (3, 8)):
        rows = {name: column[low:high] for name, column in whole.columns().items()}
        parts.append(SequenceSums(**rows, tokens=TokenStats(*(f[ENDS[low] : ENDS[high]] for f in stats))))
    joined = SequenceSums.concatenate(parts)
    assert len(joined) == 8
    for name, column in whole.columns().items():
        np.testing.assert_array_equal(joined.columns()[name], column)
    assert all(torch.equal(a, b) for a, b in zip(joined.tokens, stats))


def test_concatenate_refuses_what_would_lose_a_column():
    with pytest.raises(ValueError, match="^parts: empty, expected at least one"):
        SequenceSums.concatenate([])
    with pytest.raises(
        ValueError, match=r"^parts\[1\]: columns .*'dlogp'.*\] and tokens \[\], expected those of parts\[0\]"
    ):
        SequenceSums.concatenate([table(), table(dlogp=np.ones(2))])
    with pytest.raises(ValueError, match=r"^parts\[1\]: .* and tokens \['logp', 'entropy'\], expected"):
        SequenceSums.concatenate([table(), table(tokens=TokenStats(torch.ones(2), torch.ones(2)))])


def test_take_gives_rows_in_the_order_asked_with_their_own_tokens():
    stats, rows = token_values(53), [6, 2, 2, 4]  # of 33, 1, 1 and 0 tokens
    whole = replace(sequence_sums(stats, ENDS, group=np.arange(8) // 2), tokens=stats)
    taken = whole.take(rows)
    assert taken.rollout.tolist() == rows and taken.group.tolist() == [3, 1, 1, 2]
    assert taken.n_tokens.tolist() == [33, 1, 1, 0]
    for name, column in whole.columns().items():
        assert taken.columns()[name].tolist() == [column[row] for row in rows]
    for part, field in zip(taken.tokens, stats, strict=True):
        assert part.tolist() == [*field[20:53].tolist(), float(field[5]), float(field[5])]
    assert replace(whole, tokens=None).take(np.array(rows)).tokens is None


def test_a_table_checks_and_converts_its_columns():
    sums = table(n_tokens=[3, 4], group=np.array([1, 2], np.int32))
    assert sums.n_tokens.dtype == np.float64 and sums.group.dtype == np.int64 and len(sums) == 2
    with pytest.raises(ValueError, match=r"^dlogp: shape \[3\], expected \[S\] as n_tokens, which has \[2\]"):
        table(dlogp=np.ones(3))
    with pytest.raises(ValueError, match="^group: dtype float64, expected integers"):
        table(group=np.ones(2))
    with pytest.raises(ValueError, match="^logp: dtype <U1, expected numbers"):
        table(logp=np.array(["a", "b"]))


def test_working_dtype_is_that_of_the_widest_tensor():
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    assert working_dtype(half, None, single) == working_dtype(half) == torch.float32
    assert working_dtype(None, single, double) == torch.float64
