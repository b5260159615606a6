"""Per-sequence sums by the kernel, against exact integer arithmetic on the same values."""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from crosses import crossed
from dentropy.kernels import sequence_sums as kernel

from dentropy import TokenStats, sequence_sums, slope
from dentropy.stats import plain

on_gpu = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not on_gpu, reason="about the compiled kernel")
FULL_BLOCK = kernel.BLOCK
BLOCK = FULL_BLOCK if on_gpu else 16
LENGTHS = (0, 0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 0, 2, 3 * BLOCK + 5, 0)
SCALE = 2**1074  # every float64 is an integer over it
ULPS = 4  # of the sum of the sizes of the terms


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", BLOCK)


def ends_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@pytest.fixture
def draw(device):
    """draw(tokens, order, dtype) -> TokenStats."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens, order=2, dtype=torch.float32):
        values = torch.randn(3 + 2 * order, tokens, generator=generator, dtype=torch.float64)
        values[0], values[1], values[-1] = -values[0].abs(), values[1].abs(), values[-1].abs()
        *values, fisher = values.to(device, dtype)
        return TokenStats(*values, fisher=fisher if order else None)

    return draw


def run_kernel(stats, ends):
    """{column: NumPy [S]}"""
    ends = torch.as_tensor(ends, device=stats.logp.device)
    out = kernel.sequence_sums(*stats, cu_seqlens=ends)
    assert out.dtype == torch.float64 and out.device == stats.logp.device
    return dict(zip(kernel.columns_of(*stats), out.cpu().numpy(), strict=True))


def exact_row(stats, start, end):
    """{column: (the sum, the sum of the sizes of its terms)} of one sequence, rounded once."""
    fields = {
        name: [n * (SCALE // d) for n, d in map(float.as_integer_ratio, value[start:end].tolist())]
        for name, value in stats._asdict().items()
        if value is not None
    }
    row = {name: (sum(values) / SCALE, sum(map(abs, values)) / SCALE) for name, values in fields.items()}
    row["n_tokens"] = end - start, 0.0
    if stats.dlogp is not None:
        terms = {"entropy_dlogp": [], "entropy_to_go": [], "length_to_go": []}
        entropy_left = 0
        for tokens_left, (h, d) in enumerate(zip(reversed(fields["entropy"]), reversed(fields["dlogp"]))):
            terms["entropy_dlogp"].append(h * d)
            terms["entropy_to_go"].append(entropy_left * d)
            terms["length_to_go"].append(tokens_left * SCALE * d)
            entropy_left += h
        row |= {name: (sum(values) / SCALE**2, sum(map(abs, values)) / SCALE**2) for name, values in terms.items()}
    if stats.d2logp is not None:
        row |= exact_second_order(fields)
    return row


def exact_second_order(fields):
    """Of the columns with A_j = Σ_{k<j} dlogp_k and A_j² + Σ_{k<j} d2logp_k: (the sum, a bound of the terms' sizes)."""
    columns = dict.fromkeys(("dentropy_to_go", "entropy_to_go_2", "length_to_go_2"), (0, 0))
    first, second, first_size, second_size = 0, 0, 0, 0
    for h, dh, d, dd in zip(*(fields[name] for name in ("entropy", "dentropy", "dlogp", "d2logp"))):
        # over SCALE**2, SCALE**3 and SCALE**3
        terms = {
            "dentropy_to_go": (dh * first * SCALE, abs(dh) * first_size * SCALE),
            "entropy_to_go_2": (h * (first**2 + second), abs(h) * (first_size**2 + second_size)),
            "length_to_go_2": ((first**2 + second) * SCALE, (first_size**2 + second_size) * SCALE),
        }
        for name, (term, size) in terms.items():
            columns[name] = columns[name][0] + term, columns[name][1] + size
        first, second, first_size, second_size = (
            first + d,
            second + dd * SCALE,
            first_size + abs(d),
            second_size + abs(dd) * SCALE,
        )
    return {name: (term / SCALE**3, size / SCALE**3) for name, (term, size) in columns.items()}


def assert_exact(columns, stats, ends, rows=None):
    for i in range(len(ends) - 1) if rows is None else rows:
        row = exact_row(stats, int(ends[i]), int(ends[i + 1]))
        assert row.keys() == columns.keys()
        for name, (want, size) in row.items():
            error = abs(columns[name][i] - want)
            assert error <= ULPS * np.finfo(np.float64).eps * size, f"{name} of row {i}: {error / size}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_column_at_every_length(draw, order, dtype):
    ends = ends_of(LENGTHS)
    stats = draw(ends[-1], order, dtype)
    columns = run_kernel(stats, ends)
    assert len(columns) == {0: 3, 1: 9, 2: 14}[order]
    assert_exact(columns, stats, ends)


def with_value(values, place, value):
    values = values.clone()
    values[place] = value
    return values


HARD = {
    "one number, rounded the same way every time": lambda s: [torch.full_like(v, 0.1) for v in s],
    "an entropy outweighs all that follow": lambda s: s._replace(entropy=with_value(s.entropy, 0, 1e12)),
    "an entropy outweighs all before it": lambda s: s._replace(entropy=with_value(s.entropy, -1, 1e12)),
    "large terms that cancel": lambda s: [
        v + 1e12 * torch.tensor([1, -1], device=v.device).repeat(len(v) // 2) for v in s
    ],
    "a large common part": lambda s: [v + 1e6 for v in s],
    "all zero": lambda s: [torch.zeros_like(v) for v in s],
}


@pytest.mark.parametrize("hard", HARD)
def test_hard_values(draw, hard):
    tokens = 14 * BLOCK + 6
    stats = TokenStats(*HARD[hard](draw(tokens, 2, torch.float64)))
    ends = np.array([0, tokens])
    assert_exact(run_kernel(stats, ends), stats, ends)


@pytest.mark.parametrize("values", ["random", "constant"])
def test_a_long_sequence(draw, values, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", FULL_BLOCK)  # what a user gets; smaller ones only take longer
    tokens = 10**5 if on_gpu else 20_011
    stats = draw(tokens, 1, torch.float64)
    if values == "constant":  # every step of a plain running sum rounds in the same direction
        stats = TokenStats(*(torch.full_like(v, 0.1) for v in stats[:4]))
    ends = np.array([0, tokens])
    assert_exact(run_kernel(stats, ends), stats, ends)


@pytest.mark.parametrize("sequences", [70, pytest.param(10**6, marks=needs_gpu)])
def test_many_short_sequences(draw, sequences):
    lengths = np.random.default_rng(0).integers(0, 20, sequences)
    ends = ends_of(lengths)
    stats = draw(ends[-1], 1)
    columns = run_kernel(stats, ends)
    assert_exact(columns, stats, ends, rows=range(0, sequences, max(1, sequences // 200)))
    np.testing.assert_array_equal(columns["n_tokens"], lengths)
    want = plain.sequence_sums(stats, ends)
    for name, column in columns.items():  # up to 20 tokens: below 200 terms of size 20
        np.testing.assert_allclose(column, getattr(want, name), rtol=0, atol=1e-11, err_msg=name)


@needs_gpu
def test_offsets_beyond_two_to_the_31(device):
    room = torch.zeros(2**31 + 2**11, dtype=torch.bfloat16, device=device)
    values = room[:: 2**10]  # 2**21 + 2 tokens, 2**10 elements apart
    values[-3:] = torch.tensor([1.0, 2.0, 4.0])
    ends = np.array([0, len(values) - 3, len(values)])
    columns = run_kernel(TokenStats(values, values, values, values), ends)
    assert columns["logp"].tolist() == [0, 7] and columns["entropy_dlogp"].tolist() == [0, 21]
    assert columns["entropy_to_go"].tolist() == [0, 14] and columns["length_to_go"].tolist() == [0, 4]


def test_any_strides_and_dtypes(draw):
    ends = ends_of(LENGTHS)
    stats = draw(ends[-1], 2)
    want = run_kernel(stats, ends)
    room = torch.full((len(stats.logp), 10), math.nan, device=stats.logp.device)
    room[:, 2:9] = torch.stack(stats, 1)
    apart = torch.as_tensor(ends, device=stats.logp.device).to(torch.int32).repeat_interleave(3)[::3]
    forms = (
        TokenStats(*room[:, 2:9].unbind(1)),
        TokenStats(*(value.double() if i % 2 else value for i, value in enumerate(stats))),
        TokenStats(*(value.clone().requires_grad_() for value in stats)),
    )
    for form in forms:
        for got, expected in zip(run_kernel(form, apart).values(), want.values(), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_expanded_values(draw):
    """A stride of 0, as a constant field may have."""
    stats = draw(2 * BLOCK + 3, 1)
    ones = torch.ones(1, device=stats.logp.device).expand(2 * BLOCK + 3)
    ends = np.array([0, 5, 2 * BLOCK + 3])
    columns = run_kernel(stats._replace(entropy=ones), ends)
    np.testing.assert_array_equal(columns["entropy"], columns["n_tokens"])
    np.testing.assert_array_equal(columns["entropy_to_go"], columns["length_to_go"])


def test_no_sequences_and_no_tokens(draw):
    for order, names in ((0, 3), (1, 9), (2, 14)):
        assert [len(c) for c in run_kernel(draw(0, order), np.array([0])).values()] == [0] * names
        nothing = run_kernel(draw(0, order), np.array([0, 0, 0]))
        assert [c.tolist() for c in nothing.values()] == [[0, 0]] * names


def test_bits_of_a_sequence_do_not_depend_on_the_batch_or_the_run(draw):
    ends = ends_of(LENGTHS)
    stats = draw(ends[-1], 2)
    batch, again = run_kernel(stats, ends), run_kernel(stats, ends)
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:])):
        alone = run_kernel(TokenStats(*(v[start:end].clone() for v in stats)), np.array([0, end - start]))
        for name, column in batch.items():
            assert alone[name][0] == column[i] and again[name][i] == column[i]


def test_lower_orders_have_the_same_bits(draw):
    ends = ends_of(LENGTHS)
    stats = draw(ends[-1], 2)
    whole = run_kernel(stats, ends)
    for fewer in (stats[:2], stats[:4], stats[:6], (*stats[:4], None, None, stats.fisher)):
        for name, column in run_kernel(TokenStats(*fewer), ends).items():
            np.testing.assert_array_equal(column, whole[name])


def test_nothing_is_left_unwritten(draw, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    for order in (0, 1, 2):
        columns = run_kernel(draw(sum(LENGTHS), order), ends_of(LENGTHS))
        assert all(np.isfinite(column).all() for column in columns.values())


@needs_gpu
def test_new_sizes_compile_nothing(draw):
    run_kernel(draw(1000, 2), np.array([0, 400, 1000]))
    cache = kernel._sequence_sums_kernel.device_caches[torch.cuda.current_device()][0]
    compiled = len(cache)
    for lengths in ([1], [16], [0, 3], [7] * 16, [5000, 1], [1] * 4097):
        run_kernel(draw(sum(lengths), 2), ends_of(lengths))
    assert len(cache) == compiled


# The public function.


@pytest.fixture(params=["kernel", "reference"])
def table(request):
    return sequence_sums if request.param == "kernel" else plain.sequence_sums


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_public_function_takes_the_kernel(draw, order, monkeypatch):
    ends = ends_of(LENGTHS)
    stats = draw(ends[-1], order)
    want = run_kernel(stats, ends)

    def fail(*args):
        raise AssertionError("NumPy was called")

    monkeypatch.setattr(import_module("dentropy.stats.sequence_sums"), "plain_columns", fail)
    group = list(range(len(LENGTHS)))[::-1]
    for form in (
        ends,
        ends.tolist(),
        ends.astype(np.int32),
        torch.from_numpy(ends),
        torch.from_numpy(ends).to(stats.logp.device, torch.int32),
    ):
        got = sequence_sums(stats, form, group=group).columns()
        assert got.pop("rollout").tolist() == group[::-1] and got.pop("group").tolist() == group
        assert got.keys() == want.keys()
        for name, column in want.items():
            np.testing.assert_array_equal(got[name], column)


@crossed(
    lambda name, value: on_gpu or math.isnan(value) or name == "logp",
    name=TokenStats._fields,
    value=[math.nan, math.inf, -math.inf],
)
def test_values_that_are_not_finite_are_named(table, draw, name, value):
    ends = ends_of(LENGTHS)
    stats = draw(ends[-1])
    first = int(ends[8])  # the long sequence, behind an empty one
    getattr(stats, name)[[first + BLOCK + 3, first + BLOCK + 7]] = value
    with pytest.raises(
        ValueError, match=rf"^{name} of rollout 8: {value} at token {BLOCK + 3}, expected finite numbers$"
    ):
        table(stats, ends)


def test_infinities_that_cancel_are_named(table, draw):
    stats = draw(3 * BLOCK)
    stats.dlogp[5], stats.dlogp[BLOCK + 5] = math.inf, -math.inf
    with pytest.raises(ValueError, match=r"^dlogp of rollout 1: inf at token 2, expected finite numbers$"):
        table(stats, [0, 3, 3 * BLOCK])


@pytest.mark.parametrize("field, size, name", [("logp", 1e308, "logp"), ("dlogp", 1e306, "entropy_to_go")])
def test_finite_values_whose_sum_overflows_are_named(table, draw, field, size, name):
    stats = draw(48, 2, torch.float64)
    getattr(stats, field)[8:] = size
    message = rf"^{name} of rollout 1: (inf|nan) summed over its tokens, expected a finite number$"
    with pytest.raises(ValueError, match=message):
        table(stats, [0, 8, 48])


BAD = {
    r"stats: a tuple, expected a TokenStats": lambda s: (tuple(s), [0, 4]),
    r"stats\.entropy: shape \[3\], expected \[4\] as stats\.logp": lambda s: (
        s._replace(entropy=s.entropy[:3]),
        [0, 4],
    ),
    r"stats\.dlogp: dtype torch\.int64": lambda s: (s._replace(dlogp=s.dlogp.long()), [0, 4]),
    r"stats\.dentropy: on meta, expected (cpu|cuda:0), where": lambda s: (
        s._replace(dentropy=s.dentropy.to("meta")),
        [0, 4],
    ),
    r"stats\.dlogp and stats\.dentropy: one is None": lambda s: (s._replace(dentropy=None), [0, 4]),
    r"cu_seqlens: shape \[1, 2\], expected \[S \+ 1\]": lambda s: (s, [[0, 4]]),
    r"cu_seqlens: dtype float64, expected int32 or int64": lambda s: (s, [0.0, 4.0]),
    r"cu_seqlens: from 0 to 5, expected 0 to 4": lambda s: (s, [0, 5]),
    r"cu_seqlens\[2\]: 2, expected at least the 3 before it": lambda s: (
        s,
        torch.tensor([0, 3, 2, 4], device=s.logp.device),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises_before_any_launch(table, draw, message, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("the kernel was launched")

    monkeypatch.setattr(kernel, "sequence_sums", fail)
    stats, ends = BAD[message](draw(4, 1))
    with pytest.raises(ValueError, match="^" + message):
        table(stats, ends)


def test_the_slope_with_its_length_correction_follows_from_the_columns(draw):
    """R(η) = Σ w H / Σ w T, weights and entropies moved along the derivatives, by central differences."""
    ends = ends_of(LENGTHS)
    stats = draw(ends[-1], 1, torch.float64)
    logps, entropies = (
        [v[a:b].sum().item() for a, b in zip(ends[:-1], ends[1:])] for v in (stats.dlogp, stats.dentropy)
    )
    totals = [stats.entropy[a:b].sum().item() for a, b in zip(ends[:-1], ends[1:])]

    def entropy_per_token(eta):
        weights = [math.exp(eta * dlogp) for dlogp in logps]
        moved = [h + eta * dh for h, dh in zip(totals, entropies)]
        return sum(w * h for w, h in zip(weights, moved)) / sum(w * length for w, length in zip(weights, LENGTHS))

    step = 1e-5
    want = (entropy_per_token(step) - entropy_per_token(-step)) / (2 * step)
    assert slope(sequence_sums(stats, ends), estimator="exact").value == pytest.approx(want, rel=1e-6)
