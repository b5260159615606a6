"""Properties of token statistics up to second order, held against the kernel and the reference alike."""

import math

import pytest
import torch
from crosses import crossed
from dentropy.kernels import segments
from dentropy.kernels import token_stats as kernel
from truth import along_the_path, assert_as_accurate_as_plain_pytorch, plain_pytorch

from dentropy import TokenStats
from dentropy import token_stats as public_token_stats
from dentropy.stats import plain

on_gpu = torch.cuda.is_available()
FULL_SIZES = dict(BLOCK=kernel.BLOCK, LANES=kernel.LANES, SEGMENT=kernel.SEGMENT)
BLOCK, SEGMENT = (kernel.BLOCK, kernel.SEGMENT) if on_gpu else (64, 128)
LARGE = SEGMENT + BLOCK + 5  # several segments, several tiles in each, and a piece of one
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = torch.finfo(torch.float32).eps
needs_gpu = pytest.mark.skipif(not on_gpu, reason="about the compiled kernel")


def run_kernel(logits, targets, *tangents, **transform):
    return TokenStats(*kernel.token_stats(logits, targets, *tangents, **transform))


def fields_of(stats):
    """Those that were asked for."""
    return [field for field in stats if field is not None]


@pytest.fixture(params=["kernel", "reference"])
def token_stats(request):
    return run_kernel if request.param == "kernel" else plain.token_stats


@pytest.fixture
def draw(device):
    """draw(rows, vocabulary, dtype) -> logits, targets, dlogits, d2logits.

    Rows begin where loads of many neighbours can, whatever the vocabulary, with NaN between them.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(rows, vocabulary, dtype=torch.float32):
        values = torch.randn(3, rows, vocabulary, generator=generator)
        values[0] *= 2
        room = torch.full((3, rows, vocabulary + -vocabulary % 8), math.nan, device=device, dtype=dtype)
        room[..., :vocabulary] = values
        targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
        logits, dlogits, d2logits = room[..., :vocabulary]
        return logits, targets, dlogits, d2logits

    return draw


@crossed(
    lambda vocabulary, dtype, order: on_gpu or (dtype == torch.float32 and order == 2) or vocabulary == LARGE,
    vocabulary=[1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, LARGE],
    dtype=DTYPES,
    order=[0, 1, 2],
)
def test_any_vocabulary_dtype_and_order(token_stats, draw, vocabulary, dtype, order):
    inputs = draw(3, vocabulary, dtype)[: 2 + order]
    stats = token_stats(*inputs)
    assert_as_accurate_as_plain_pytorch(stats, *inputs)
    assert all(field.dtype == torch.float32 and field.shape == (3,) for field in fields_of(stats))
    assert stats[2 + 2 * order : 6] == (None,) * (4 - 2 * order) and (stats.fisher is None) == (order == 0)


@needs_gpu
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("vocabulary", [32000, 49152, 128256, 151936, 262144])
def test_vocabularies_of_real_models(token_stats, draw, vocabulary, order):
    inputs = draw(129, vocabulary, torch.bfloat16)[: 2 + order]
    assert_as_accurate_as_plain_pytorch(token_stats(*inputs), *inputs)


@pytest.mark.parametrize("rows, order", [(0, 2), (1, 2), (129, 0)])
def test_any_number_of_rows(token_stats, draw, rows, order):
    inputs = draw(rows, 7)[: 2 + order]
    stats = token_stats(*inputs)
    assert all(field.shape == (rows,) for field in fields_of(stats))
    if rows:
        assert_as_accurate_as_plain_pytorch(stats, *inputs)


HARD_ROWS = {
    "uniform": lambda z, y, d, e: (torch.zeros_like(z), y, d, e),
    "one-hot at the first token": lambda z, y, d, e: (one_hot(z, 0), y, d, e),
    "one-hot at the last token": lambda z, y, d, e: (one_hot(z, -1), y, d, e),
    "one-hot at the target": lambda z, y, d, e: (one_hot(z, 3), torch.full_like(y, 3), d, e),
    "z + 1000": lambda z, y, d, e: (z + 1e3, y, d, e),
    "z * 100": lambda z, y, d, e: (z * 100, y, d, e),
    "the maximum comes last": lambda z, y, d, e: (z.sort(-1).values, y, d.sort(-1).values, e),
    "the maximum stands alone": lambda z, y, d, e: (0.05 * z - 4 * (1 - one_hot(z, 3) / 50), y, d, e),
    "all but the maximum at -10000": lambda z, y, d, e: (200 * one_hot(z, 3) - 1e4 + 0.01 * z, y, 1e3 + d, e - 1e3),
    "constant derivatives": lambda z, y, d, e: (z, y, torch.full_like(d, 30.0), torch.full_like(e, -7.0)),
    "derivative 30 + noise": lambda z, y, d, e: (z, y, 30 + 0.01 * d, 0.01 * e),
    "second derivative 30 + noise": lambda z, y, d, e: (z, y, 0.1 * d, 30 + 0.01 * e),
    "one large derivative": lambda z, y, d, e: (z, y, d + 20 * one_hot(z, 3), e),
    "one large second derivative": lambda z, y, d, e: (z, y, d, e + 20 * one_hot(z, -1)),
    "derivatives as the logits": lambda z, y, d, e: (z, y, z, z),
    "target at the last token": lambda z, y, d, e: (z, torch.full_like(y, z.shape[-1] - 1), d, e),
}


def one_hot(like, column):
    row = torch.zeros_like(like)
    row[:, column] = 50.0
    return row


@crossed(
    lambda rows, transform: on_gpu or bool(transform) == list(HARD_ROWS).index(rows) % 2,
    rows=HARD_ROWS,
    transform=[{}, dict(softcap=4.0, temperature=1.3)],
)
def test_hard_rows(token_stats, draw, rows, transform):
    inputs = HARD_ROWS[rows](*draw(2, LARGE))
    stats = token_stats(*inputs, **transform)
    assert_as_accurate_as_plain_pytorch(stats, *inputs, **transform)
    slack = 2.0**-20
    assert (stats.logp <= 0).all()
    assert (stats.entropy >= -slack).all() and (stats.entropy <= (1 + slack) * math.log(LARGE)).all()


def test_constant_derivatives_move_nothing(token_stats, draw):
    logits, targets, dlogits, d2logits = draw(3, LARGE)
    stats = token_stats(logits, targets, torch.full_like(dlogits, 30.0), torch.full_like(d2logits, -7.0))
    assert all(field.abs().max() < UNIT for field in stats[2:])


@pytest.mark.parametrize("common", [1e3] + [30.0] * on_gpu)
@pytest.mark.parametrize("masked", [0, BLOCK + 1, SEGMENT], ids=["nothing", "first tile", "first segment"])
def test_a_common_part_of_the_derivatives_costs_no_digits(token_stats, draw, masked, common):
    logits, targets, dlogits, d2logits = draw(4, LARGE)
    dlogits, d2logits = common + 0.01 * dlogits, -common + 0.01 * d2logits
    logits[:, :masked] = -math.inf
    targets = masked + targets % (LARGE - masked)
    stats = token_stats(logits, targets, dlogits, d2logits)
    kept = logits[:, masked:], targets - masked, dlogits[:, masked:] - common, d2logits[:, masked:] + common  # exact
    assert_as_accurate_as_plain_pytorch(stats, *kept)


@crossed(
    lambda temperature, softcap: on_gpu or temperature == 0.02 or softcap == 1.0,
    temperature=[1.0, 0.02],
    softcap=[0.01, 1.0, 30.0, 1e4],
)
def test_softcap_and_temperature_of_any_size(token_stats, draw, softcap, temperature):
    inputs, transform = draw(3, BLOCK + 5), dict(softcap=softcap, temperature=temperature)
    assert_as_accurate_as_plain_pytorch(token_stats(*inputs, **transform), *inputs, **transform)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked_derivative", [1e30, math.nan] + [0.0, math.inf] * on_gpu)
def test_masked_logits_contribute_exactly_nothing(token_stats, draw, masked_derivative, softcap):
    inputs = logits, targets, dlogits, d2logits = draw(3, 2 * SEGMENT + BLOCK + 5)
    keep = torch.zeros_like(logits[0], dtype=torch.bool)
    keep[SEGMENT + BLOCK + 1 : 2 * SEGMENT : 2] = True  # nothing of the first and last segments and a tile between
    logits[:, ~keep], dlogits[:, ~keep], d2logits[:, ~keep] = -math.inf, masked_derivative, -masked_derivative
    dlogits[0, ~keep] = 0.0  # only the second derivative is not finite
    targets.copy_(keep.nonzero()[:, 0][targets % int(keep.sum())])
    stats = token_stats(*inputs, softcap=softcap)
    kept = logits[:, keep], keep.cumsum(0)[targets] - 1, dlogits[:, keep], d2logits[:, keep]
    assert_as_accurate_as_plain_pytorch(stats, *kept, softcap=softcap)


def test_all_but_one_logit_masked(token_stats, draw):
    logits, targets, dlogits, d2logits = draw(3, LARGE)
    only = torch.arange(LARGE, device=logits.device) == targets[:, None]
    for field in token_stats(logits.masked_fill(~only, -math.inf), targets, dlogits, d2logits):
        assert (field == 0).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_masked_targets_and_rows(token_stats, draw, softcap):
    inputs = logits, targets, _, _ = draw(3, 2 * BLOCK)
    logits[0, targets[0]] = -math.inf
    logits[1] = -math.inf
    stats = token_stats(*inputs, softcap=softcap)
    assert stats.logp[0] == -math.inf and all(field[0].isfinite() for field in stats[1:])
    assert all(field[1].isnan() for field in stats)
    last = TokenStats(*(field[2:] for field in stats))
    assert_as_accurate_as_plain_pytorch(last, *(tensor[2:] for tensor in inputs), softcap=softcap)


def test_masks_of_the_smallest_float(token_stats, draw):
    """finfo.min is a common mask; divided by a temperature below 1 it leaves the range of float32."""
    logits, targets, *tangents = draw(3, 2 * BLOCK)
    masked = logits.clone()
    masked[:, ::2] = torch.finfo(torch.float32).min
    targets = targets // 2 * 2 + 1
    stats = token_stats(masked, targets, *tangents, temperature=0.5)
    kept = logits[:, 1::2], targets // 2, *(tangent[:, 1::2] for tangent in tangents)
    assert_as_accurate_as_plain_pytorch(stats, *kept, temperature=0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible_and_in_its_row(token_stats, draw, bad):
    logits, targets, dlogits, d2logits = inputs = draw(5, 2 * BLOCK)
    logits[1, 5], dlogits[2, 5], d2logits[3, 5] = abs(bad), bad, bad
    logits[2:4, 5] = -300.0  # its weight is 0 in float32
    stats = token_stats(*inputs)
    assert all(field[1].isnan() for field in stats)
    first, second = {"dlogp", "dentropy", "fisher"}, {"d2logp", "d2entropy"}  # what needs ż, and z̈ too
    for row, lost in ((2, first | second), (3, second)):
        assert {name for name, field in stats._asdict().items() if not field[row].isfinite()} == lost
    assert all(field[[0, 4]].isfinite().all() for field in stats)


def test_any_strides_and_integer_targets(token_stats, draw):
    logits, targets, dlogits, d2logits = draw(2, LARGE)
    room = torch.full((2, 3, LARGE + 9), math.nan, device=logits.device)
    room[:, 1, 4:-5] = logits
    layouts = {
        "contiguous": (logits.contiguous(), targets, dlogits.contiguous(), d2logits.contiguous()),
        "rows far apart": (room[:, 1, 4:-5], targets.to(torch.int32).repeat_interleave(2)[::2], dlogits, d2logits),
        "transposed": (logits, targets, dlogits.T.contiguous().T, d2logits.repeat_interleave(2, 1)[:, ::2]),
        "one row for all": (logits[:1].expand(2, -1), targets, dlogits[:1].expand(2, -1), d2logits),
    }
    for inputs in layouts.values():
        assert_as_accurate_as_plain_pytorch(token_stats(*inputs), *inputs)


def test_logits_and_derivatives_may_differ_in_dtype(token_stats, draw):
    logits, targets, dlogits, d2logits = draw(3, BLOCK + 5)
    inputs = logits.bfloat16(), targets, dlogits, d2logits.half()
    assert_as_accurate_as_plain_pytorch(token_stats(*inputs), *inputs)


def test_identities_of_a_distribution_that_moves(token_stats, draw, monkeypatch):
    """Σ p = 1 and its two derivatives, h = −Σ p log p and its two derivatives."""
    if not on_gpu:  # a row for each token, and each takes the interpreter a fifth of a second
        for name, size in dict(BLOCK=16, LANES=2, SEGMENT=32).items():
            monkeypatch.setattr(kernel, name, size)
    vocabulary = kernel.BLOCK + 1
    logits, _, *tangents = draw(1, vocabulary)
    every = torch.arange(vocabulary, device=logits.device)
    stats = token_stats(*(logits.expand(vocabulary, -1), every, *(t.expand(vocabulary, -1) for t in tangents)))
    logp, h, dlogp, dh, d2logp, d2h, fisher = (field.double() for field in stats)
    p = logp.exp()
    d2p = p * (d2logp + dlogp**2)
    for got, want in (
        (p, 1),
        (p * dlogp, 0),
        (d2p, 0),
        (-p * logp, h[0]),
        (-p * logp * dlogp, dh[0]),
        (-d2p * logp - p * dlogp**2, d2h[0]),
        (p * dlogp**2, fisher[0]),
    ):
        assert got.sum().item() == pytest.approx(float(want), rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("transform", [{}, dict(softcap=4.0, temperature=1.3)], ids=str)
def test_second_derivatives_are_the_slopes_of_the_first(token_stats, draw, transform):
    """Central differences in float64 of ż_y − E ż and −Cov(z, ż), along the path that z̈ belongs to."""
    inputs = draw(3, BLOCK + 5)
    targets, (logits, *tangents) = inputs[1], (tensor.double() for tensor in (inputs[0], *inputs[2:]))

    def first_derivatives(eta):
        z = along_the_path(eta, logits, *tangents, **transform)
        dz = tangents[0] + eta * tangents[1]
        if transform:
            t = z * transform["temperature"] / transform["softcap"]
            dz = dz * (1 - t * t) / transform["temperature"]
        p = torch.softmax(z, -1)
        dz = dz - (p * dz).sum(-1, keepdim=True)
        return dz.gather(-1, targets[:, None])[:, 0], -(p * z * dz).sum(-1)

    step, stats = 1e-4, token_stats(*inputs, **transform)
    slopes = [(high - low) / (2 * step) for low, high in zip(first_derivatives(-step), first_derivatives(step))]
    for got, want in zip(stats[4:], slopes):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_powers_of_the_step(token_stats, draw):
    """First order is linear in ż; second order is linear in z̈ and, where z̈ is 0, quadratic in ż."""
    logits, targets, first, second = draw(2, BLOCK + 5)
    _, _, other, zero = draw(2, BLOCK + 5)
    zero = torch.zeros_like(zero)

    def fields(dlogits, d2logits):
        return torch.stack(token_stats(logits, targets, dlogits, d2logits)[2:6]).unflatten(0, (2, 2))

    def same(got, want):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    of_first, of_other = fields(first, zero), fields(other, zero)
    together, apart = fields(first + other, second), fields(first - other, 2 * second)
    same(together[0], of_first[0] + of_other[0])
    same(together[1] + apart[1], 2 * (of_first + of_other)[1] + fields(zero, 3 * second)[1])
    same(fields(zero, second)[1], fields(first, second)[1] - of_first[1])


def test_inputs_are_left_alone_and_no_graph_is_built(token_stats, draw):
    logits, *others = inputs = draw(2, BLOCK + 5)
    before = [tensor.clone() for tensor in inputs]
    stats = token_stats(logits.detach().requires_grad_(), *others, softcap=3.0)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before))
    assert not any(field.requires_grad for field in stats)


# What only the kernel promises.


@pytest.mark.skipif(on_gpu, reason="everything there has these sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_lanes_and_segments_of_full_size(draw, dtype, monkeypatch):
    for name, size in FULL_SIZES.items():
        monkeypatch.setattr(kernel, name, size)
    inputs = draw(1, FULL_SIZES["SEGMENT"] + 5, dtype)
    assert_as_accurate_as_plain_pytorch(run_kernel(*inputs), *inputs)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_bits_of_a_row_do_not_depend_on_the_batch_or_the_run(draw, order):
    inputs = draw(3, LARGE)[: 2 + order]
    batch, again = (torch.stack(fields_of(run_kernel(*inputs))) for _ in range(2))
    alone = [torch.stack(fields_of(run_kernel(*(tensor[row : row + 1] for tensor in inputs)))) for row in range(3)]
    assert batch.isfinite().all()
    assert torch.equal(again, batch) and torch.equal(torch.cat(alone, 1), batch)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_nothing_is_left_unwritten(draw, order, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    assert all(field.isfinite().all() for field in fields_of(run_kernel(*draw(2, LARGE)[: 2 + order])))


@pytest.mark.parametrize("target", [-1, LARGE, 2**40, -(2**40)])
def test_a_target_out_of_range_makes_its_row_nan(draw, target):
    inputs = draw(3, LARGE)
    inputs[1][1] = target  # 2**40 elements on would be outside any allocation: reading there ends the process
    stats = run_kernel(*inputs)
    assert all(field[1].isnan() and field[[0, 2]].isfinite().all() for field in stats)


def test_validate_raises_for_a_target_out_of_range(draw):
    inputs = draw(3, 2 * BLOCK)
    inputs[1][1] = 2 * BLOCK
    with pytest.raises(ValueError, match=rf"targets\[1\]: {2 * BLOCK}"):
        public_token_stats(*inputs, validate=True)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_public_function_takes_the_kernel_where_it_can(draw, order, monkeypatch):
    inputs, transform = draw(2, BLOCK + 5)[: 2 + order], dict(temperature=0.7, softcap=3.0)
    want = fields_of(run_kernel(*inputs, **transform))

    def fail(*args, **options):
        raise AssertionError("the reference was called")

    with monkeypatch.context() as patch:
        patch.setattr(plain, "stats_of_logits", fail)
        got = public_token_stats(*inputs, **transform)
        assert all(torch.equal(a, b) for a, b in zip(fields_of(got), want, strict=True))
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    assert public_token_stats(*doubles).logp.dtype == torch.float64


@needs_gpu
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_new_number_of_rows_compiles_nothing(draw, order):
    inputs = draw(64, 4096)[: 2 + order]

    def compiled():
        device = torch.cuda.current_device()
        return [
            len(jitted.device_caches[device][0]) for jitted in (kernel._token_states_kernel, segments._stats_kernel)
        ]

    run_kernel(*inputs)
    before = compiled()
    assert all(before)
    for rows in (1, 2, 16, 33, 63):
        run_kernel(*(tensor[:rows] for tensor in inputs))
    assert compiled() == before


@needs_gpu
@pytest.mark.parametrize("order", [0, 1, 2])
def test_more_than_two_to_the_31_elements(device, order):
    rows, vocabulary = 2**31 // 65536 + 3, 65536
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=device)
    logits[-1, 17] = 8.0
    targets = torch.full((rows,), 17, device=device)
    stats = run_kernel(logits, targets, *[logits] * order)
    want = plain_pytorch(logits[-2:], targets[-2:], *[logits[-2:]] * order)
    for name, value in want.items():
        torch.testing.assert_close(getattr(stats, name)[-2:].double(), value, rtol=1e-5, atol=1e-6)
