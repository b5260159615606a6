"""Sums over rollouts against the reference, and what only long rollouts and large tables show."""

import math
import time

import numpy as np
import pytest
import torch
from draws import token_values

from dentropy import TokenStats, reference, sequence_sums

ENDS = [0, 0, 5, 6, 6, 6, 20, 53, 53]  # lengths 0, 5, 1, 0, 0, 14, 33, 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_column_against_its_definition(order, dtype):
    stats = token_values(53, order, dtype)
    sums = sequence_sums(stats, ENDS)
    want = reference.sequence_sums(stats, ENDS).columns()
    columns = sums.columns()
    assert list(columns) == list(want)
    for name, column in want.items():
        assert columns[name].dtype == (np.int64 if name in ("group", "rollout") else np.float64)
        np.testing.assert_allclose(columns[name], column, rtol=1e-13, atol=1e-13, err_msg=name)
    second = ["d2logp", "d2entropy", "dentropy_to_go", "entropy_to_go_2", "length_to_go_2"]
    first = ["dlogp", "dentropy", "entropy_dlogp", "entropy_to_go", "length_to_go", "fisher"]
    assert all(getattr(sums, name) is None for name in {0: first + second, 1: second, 2: []}[order])
    np.testing.assert_array_equal(sums.rollout, np.arange(8))
    assert sums.tokens is None


@pytest.mark.parametrize(
    "ends",
    [ENDS, np.array(ENDS, np.int32), torch.tensor(ENDS), torch.tensor(ENDS).int()],
    ids=["list", "int32 array", "int64 tensor", "int32 tensor"],
)
def test_forms_of_cu_seqlens_and_group(ends):
    stats = token_values(53)
    np.testing.assert_array_equal(sequence_sums(stats, ends).logp, sequence_sums(stats, ENDS).logp)
    np.testing.assert_array_equal(sequence_sums(stats, ends).group, np.arange(8))
    for group in ([3, 3, 1, 1, 0, 0, 7, 7], torch.tensor([3, 3, 1, 1, 0, 0, 7, 7])):
        sums = sequence_sums(stats, ends, group=group)
        assert sums.group.dtype == np.int64 and sums.group.tolist() == [3, 3, 1, 1, 0, 0, 7, 7]


def test_no_sequences_and_no_tokens():
    empty = token_values(0)
    assert len(sequence_sums(empty, [0])) == 0
    assert len(sequence_sums(empty, [0], group=[])) == 0
    nothing = sequence_sums(empty, [0, 0, 0], group=[0, 0]).columns()
    assert nothing.pop("rollout").tolist() == [0, 1]
    assert all(column.tolist() == [0, 0] for column in nothing.values())


def test_a_row_does_not_feel_the_rows_around_it():
    """Behind a million tokens of other sequences, a million times larger, it has all its digits."""
    small = token_values(200, dtype=torch.float64)
    large = TokenStats(*(1e6 * field for field in token_values(10**6, dtype=torch.float64, seed=1)))
    both = TokenStats(*(torch.cat(pair) for pair in zip(large, small)))
    ends = [*range(0, 10**6 + 1, 1000), 10**6 + 200]
    alone, among = sequence_sums(small, [0, 200]), sequence_sums(both, ends)
    for name in ("logp", "entropy_dlogp", "entropy_to_go", "length_to_go", "dentropy_to_go", "length_to_go_2"):
        assert getattr(among, name)[-1] == pytest.approx(getattr(alone, name)[0], rel=1e-12)


def test_a_sequence_of_a_hundred_thousand_tokens():
    stats = token_values(10**5, order=1)
    sums = sequence_sums(stats, [0, 10**5])
    h, dlogp = stats.entropy.double().numpy().astype(np.longdouble), stats.dlogp.double().numpy()
    to_go = h[::-1].cumsum()[::-1] - h
    want = math.fsum((to_go * dlogp).tolist())
    size = math.fsum(np.abs(to_go * dlogp).tolist())
    assert abs(sums.entropy_to_go[0] - want) < 1e-14 * size
    want = math.fsum((np.arange(10**5 - 1, -1, -1) * dlogp).tolist())
    assert sums.length_to_go[0] == pytest.approx(want, rel=1e-12)


def test_a_million_sequences_take_seconds():
    lengths = np.random.default_rng(0).integers(0, 8, 10**6)
    ends = np.concatenate([[0], lengths.cumsum()])
    stats = token_values(int(ends[-1]), order=1)
    start = time.perf_counter()
    sums = sequence_sums(stats, ends)
    assert time.perf_counter() - start < 10
    assert len(sums) == 10**6
    assert sums.entropy.sum() == pytest.approx(stats.entropy.double().sum().item(), rel=1e-12)
