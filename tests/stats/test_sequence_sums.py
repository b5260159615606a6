import math
import time

import numpy as np
import pytest
import torch

from dentropy import SequenceSums, TokenStats, reference, sequence_sums
from dentropy.stats import plain

FIELDS = TokenStats._fields


def random_stats(tokens, order=2, dtype=torch.float32, seed=0):
    values = torch.randn(6, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[0], values[1] = -values[0].abs(), values[1].abs()
    return TokenStats(*values.to(dtype)[: 2 + 2 * order])


def one_by_one(stats, cu_seqlens):
    """The definitions, token by token, summed exactly."""
    fields = {name: field.double().tolist() for name, field in stats._asdict().items() if field is not None}
    rows = []
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:]):
        row = {name: math.fsum(values[start:end]) for name, values in fields.items()}
        row["n_tokens"] = end - start
        if "dlogp" in fields:
            h, dlogp, ks = fields["entropy"], fields["dlogp"], range(start, end)
            row["entropy_dlogp"] = math.fsum(h[k] * dlogp[k] for k in ks)
            row["length_to_go"] = math.fsum((end - 1 - k) * dlogp[k] for k in ks)
            row["entropy_to_go"] = math.fsum(dlogp[k] * math.fsum(h[k + 1 : end]) for k in ks)
        if "d2logp" in fields:
            before = {j: math.fsum(dlogp[start:j]) for j in ks}
            bend = {j: before[j] ** 2 + math.fsum(fields["d2logp"][start:j]) for j in ks}
            row["dentropy_to_go"] = math.fsum(before[j] * fields["dentropy"][j] for j in ks)
            row["entropy_to_go_2"] = math.fsum(bend[j] * h[j] for j in ks)
            row["length_to_go_2"] = math.fsum(bend.values())
        rows.append(row)
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}


ENDS = [0, 0, 5, 6, 6, 6, 20, 53, 53]  # lengths 0, 5, 1, 0, 0, 14, 33, 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_column_against_its_definition(order, dtype):
    stats = random_stats(53, order, dtype)
    sums = sequence_sums(stats, ENDS)
    want = one_by_one(stats, ENDS)
    columns = sums.columns()
    assert set(columns) == set(want) | {"group", "rollout"}
    for name, column in want.items():
        assert columns[name].dtype == np.float64
        np.testing.assert_allclose(columns[name], column, rtol=1e-13, atol=1e-13, err_msg=name)
    second = ["d2logp", "d2entropy", "dentropy_to_go", "entropy_to_go_2", "length_to_go_2"]
    first = ["dlogp", "dentropy", "entropy_dlogp", "entropy_to_go", "length_to_go"]
    assert all(getattr(sums, name) is None for name in {0: first + second, 1: second, 2: []}[order])
    np.testing.assert_array_equal(sums.rollout, np.arange(8))
    assert sums.tokens is None


@pytest.mark.parametrize(
    "ends",
    [ENDS, np.array(ENDS, np.int32), torch.tensor(ENDS), torch.tensor(ENDS).int()],
    ids=["list", "int32 array", "int64 tensor", "int32 tensor"],
)
def test_forms_of_cu_seqlens_and_group(ends):
    stats = random_stats(53)
    np.testing.assert_array_equal(sequence_sums(stats, ends).logp, sequence_sums(stats, ENDS).logp)
    np.testing.assert_array_equal(sequence_sums(stats, ends).group, np.arange(8))
    for group in ([3, 3, 1, 1, 0, 0, 7, 7], torch.tensor([3, 3, 1, 1, 0, 0, 7, 7])):
        sums = sequence_sums(stats, ends, group=group)
        assert sums.group.dtype == np.int64 and sums.group.tolist() == [3, 3, 1, 1, 0, 0, 7, 7]


def test_no_sequences_and_no_tokens():
    empty = random_stats(0)
    assert len(sequence_sums(empty, [0])) == 0
    assert len(sequence_sums(empty, [0], group=[])) == 0
    nothing = sequence_sums(empty, [0, 0, 0], group=[0, 0]).columns()
    assert nothing.pop("rollout").tolist() == [0, 1]
    assert all(column.tolist() == [0, 0] for column in nothing.values())


def test_a_row_does_not_feel_the_rows_around_it():
    """Behind a million tokens of other sequences, a million times larger, it has all its digits."""
    small = random_stats(200, dtype=torch.float64)
    large = TokenStats(*(1e6 * field for field in random_stats(10**6, dtype=torch.float64, seed=1)))
    both = TokenStats(*(torch.cat(pair) for pair in zip(large, small)))
    ends = [*range(0, 10**6 + 1, 1000), 10**6 + 200]
    alone, among = sequence_sums(small, [0, 200]), sequence_sums(both, ends)
    for name in ("logp", "entropy_dlogp", "entropy_to_go", "length_to_go", "dentropy_to_go", "length_to_go_2"):
        assert getattr(among, name)[-1] == pytest.approx(getattr(alone, name)[0], rel=1e-12)


def test_a_sequence_of_a_hundred_thousand_tokens():
    stats = random_stats(10**5, order=1)
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
    stats = random_stats(int(ends[-1]), order=1)
    start = time.perf_counter()
    sums = sequence_sums(stats, ends)
    assert time.perf_counter() - start < 10
    assert len(sums) == 10**6
    assert sums.entropy.sum() == pytest.approx(stats.entropy.double().sum().item(), rel=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_definition_written_down(order):
    stats = random_stats(53, order)
    sums = reference.sequence_sums(stats, ENDS)
    want = one_by_one(stats, ENDS)
    assert set(sums.columns()) == set(want) | {"group", "rollout"}
    for name, column in want.items():
        np.testing.assert_allclose(getattr(sums, name), column, rtol=1e-13, atol=1e-13, err_msg=name)


def test_the_reference_has_it_too():
    stats = random_stats(53)
    want = sequence_sums(stats, ENDS).dlogp
    np.testing.assert_array_equal(plain.sequence_sums(stats, ENDS).dlogp, want)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FIELDS)
def test_values_that_are_not_finite_are_named(name, value):
    stats = random_stats(53)
    getattr(stats, name)[[37, 40]] = value  # rollout 6 starts at 20
    with pytest.raises(ValueError, match=rf"^{name} of rollout 6 is not finite \(token 17: {value}\)$"):
        sequence_sums(stats, ENDS)


STATS = random_stats(4, order=1)
BAD = {
    r"stats is a tuple, expected a TokenStats": dict(stats=tuple(STATS)),
    r"stats\.entropy has shape \[3\], expected \[4\] as stats\.logp": dict(stats=STATS._replace(entropy=torch.ones(3))),
    r"stats\.entropy is a NoneType": dict(stats=STATS._replace(entropy=None)),
    r"stats\.logp has dtype torch\.int64": dict(stats=STATS._replace(logp=torch.ones(4).long())),
    r"stats\.dlogp and stats\.dentropy: one is None": dict(stats=STATS._replace(dentropy=None)),
    r"stats\.d2logp and stats\.d2entropy: one is None": dict(stats=STATS._replace(d2logp=torch.ones(4))),
    r"stats\.dlogp is None, expected a tensor beside stats\.d2logp": dict(
        stats=TokenStats(*random_stats(4))._replace(dlogp=None, dentropy=None)
    ),
    r"cu_seqlens has shape \[1, 2\], expected \[S \+ 1\]": dict(cu_seqlens=[[0, 4]]),
    r"cu_seqlens has shape \[0\], expected \[S \+ 1\]": dict(cu_seqlens=[]),
    r"cu_seqlens has dtype float64, expected int32 or int64": dict(cu_seqlens=[0.0, 4.0]),
    r"cu_seqlens goes from 1 to 4, expected 0 to 4": dict(cu_seqlens=[1, 4]),
    r"cu_seqlens goes from 0 to 5, expected 0 to 4": dict(cu_seqlens=[0, 5]),
    r"cu_seqlens falls from 3 to 2 at index 2": dict(cu_seqlens=[0, 3, 2, 4]),
    r"group has shape \[1\], expected \[2\], one entry per sequence": dict(group=[0]),
    r"group has dtype float64, expected integers": dict(group=[0.0, 1.0]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = dict(stats=STATS, cu_seqlens=[0, 2, 4]) | BAD[message]
    with pytest.raises(ValueError, match="^" + message):
        sequence_sums(arguments.pop("stats"), arguments.pop("cu_seqlens"), **arguments)


# The table itself.


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
    stats = random_stats(53)
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
    with pytest.raises(ValueError, match="parts is empty"):
        SequenceSums.concatenate([])
    with pytest.raises(ValueError, match=r"parts\[1\] has the columns .*'dlogp'"):
        SequenceSums.concatenate([table(), table(dlogp=np.ones(2))])
    with pytest.raises(ValueError, match=r"parts\[1\] .* and the tokens \['logp', 'entropy'\]"):
        SequenceSums.concatenate([table(), table(tokens=TokenStats(torch.ones(2), torch.ones(2)))])


def test_a_table_checks_and_converts_its_columns():
    sums = table(n_tokens=[3, 4], group=np.array([1, 2], np.int32))
    assert sums.n_tokens.dtype == np.float64 and sums.group.dtype == np.int64 and len(sums) == 2
    with pytest.raises(ValueError, match=r"dlogp has shape \[3\], expected \[S\]"):
        table(dlogp=np.ones(3))
    with pytest.raises(ValueError, match="group has dtype float64, expected integers"):
        table(group=np.ones(2))
