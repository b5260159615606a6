"""Properties of token statistics up to first order, held against the kernel and the reference alike."""

import math

import pytest
import torch
from dentropy.kernels import token_stats as kernel
from truth import FIELDS, assert_as_accurate_as_plain_pytorch, plain_pytorch, spread

from dentropy import TokenStats, linear_token_stats, reference
from dentropy import token_stats as public_token_stats

BLOCK = 64 if not torch.cuda.is_available() else kernel.BLOCK
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="about the compiled kernel")


def run_kernel(logits, targets, dlogits=None, *, temperature=1.0, softcap=None):
    return TokenStats(*kernel.token_stats(logits, targets, dlogits, temperature=temperature, softcap=softcap))


@pytest.fixture(params=["kernel", "reference"])
def token_stats(request):
    return run_kernel if request.param == "kernel" else reference.token_stats


@pytest.fixture
def draw(device):
    """draw(rows, vocabulary, dtype) -> logits, targets, dlogits."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows, vocabulary, dtype=torch.float32):
        logits, dlogits = torch.randn(2, rows, vocabulary, generator=generator)
        targets = torch.randint(vocabulary, (rows,), generator=generator)
        return (2 * logits).to(device, dtype), targets.to(device), dlogits.to(device, dtype)

    return draw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_any_vocabulary_and_dtype(token_stats, draw, vocabulary, dtype):
    logits, targets, dlogits = draw(3, vocabulary, dtype)
    stats = token_stats(logits, targets, dlogits)
    assert_as_accurate_as_plain_pytorch(stats, logits, targets, dlogits)
    assert stats.d2logp is None and stats.d2entropy is None
    assert all(field.dtype == torch.float32 and field.shape == (3,) for field in stats[:4])


@needs_gpu
@pytest.mark.parametrize("vocabulary", [32000, 49152, 128256, 151936, 262144])
def test_vocabularies_of_real_models(token_stats, draw, vocabulary):
    logits, targets, dlogits = draw(129, vocabulary, torch.bfloat16)
    assert_as_accurate_as_plain_pytorch(token_stats(logits, targets, dlogits), logits, targets, dlogits)


@pytest.mark.parametrize("rows", [0, 1, 3, 129])
def test_any_number_of_rows(token_stats, draw, rows):
    logits, targets, dlogits = draw(rows, BLOCK + 3)
    stats = token_stats(logits, targets, dlogits)
    assert all(field.shape == (rows,) for field in stats[:4])
    if rows:
        assert_as_accurate_as_plain_pytorch(stats, logits, targets, dlogits)


HARD_ROWS = {
    "uniform": lambda z, y, d: (torch.zeros_like(z), y, d),
    "one-hot at the first token": lambda z, y, d: (one_hot(z, 0), y, d),
    "one-hot at the last token": lambda z, y, d: (one_hot(z, -1), y, d),
    "one-hot at the target": lambda z, y, d: (one_hot(z, 3), torch.full_like(y, 3), d),
    "z + 1000": lambda z, y, d: (z + 1e3, y, d),
    "z * 100": lambda z, y, d: (z * 100, y, d),
    "the maximum comes last": lambda z, y, d: (z.sort(-1).values, y, d.sort(-1).values),
    "the maximum stands alone": lambda z, y, d: (0.05 * z - 4 * (1 - one_hot(z, 3) / 50), y, d),
    "constant derivative": lambda z, y, d: (z, y, torch.full_like(d, 30.0)),
    "derivative 30 + noise": lambda z, y, d: (z, y, 30 + 0.01 * d),
    "one large derivative": lambda z, y, d: (z, y, d + 20 * one_hot(z, 3)),
    "target at the last token": lambda z, y, d: (z, torch.full_like(y, z.shape[-1] - 1), d),
}


def one_hot(like, column):
    row = torch.zeros_like(like)
    row[:, column] = 50.0
    return row


@pytest.mark.parametrize("transform", [{}, dict(temperature=0.7), dict(softcap=4.0, temperature=1.3)],
                         ids=str)
@pytest.mark.parametrize("rows", HARD_ROWS)
def test_hard_rows(token_stats, draw, rows, transform):
    logits, targets, dlogits = HARD_ROWS[rows](*draw(8, 3 * BLOCK + 5))
    stats = token_stats(logits, targets, dlogits, **transform)
    assert_as_accurate_as_plain_pytorch(stats, logits, targets, dlogits, **transform)
    assert (stats.logp <= 0).all()
    assert_entropy_in_bounds(stats.entropy, logits.shape[-1])


def assert_entropy_in_bounds(entropy, vocabulary):
    slack = 2.0**-20
    assert (entropy >= -slack).all() and (entropy <= (1 + slack) * math.log(vocabulary)).all()


def test_a_constant_derivative_moves_nothing(token_stats, draw):
    logits, targets, dlogits = draw(8, 3 * BLOCK + 5)
    stats = token_stats(logits, targets, torch.full_like(dlogits, 30.0))
    rounding = torch.finfo(torch.float32).eps
    assert stats.dlogp.abs().max() < rounding and stats.dentropy.abs().max() < rounding


@pytest.mark.parametrize("masked", [0, BLOCK + 1], ids=["whole", "first tile masked"])
def test_a_common_part_of_the_derivative_costs_no_digits(token_stats, draw, masked):
    logits, targets, dlogits = draw(8, 3 * BLOCK + 5)
    dlogits = 30 + 0.01 * dlogits
    logits[:, :masked] = -math.inf
    targets = masked + targets % (logits.shape[-1] - masked)
    truth = plain_pytorch(logits[:, masked:], targets - masked, dlogits[:, masked:])["dentropy"]
    stats = token_stats(logits, targets, dlogits)
    torch.testing.assert_close(stats.dentropy.double(), truth, rtol=5e-3, atol=0)
    scale = (spread(logits[:, masked:]) * spread(dlogits[:, masked:])).max()
    assert (stats.dentropy - truth).abs().max() < 4 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 1e4])
def test_softcap_of_any_size(token_stats, draw, softcap):
    logits, targets, dlogits = draw(8, BLOCK + 5)
    stats = token_stats(logits, targets, dlogits, softcap=softcap)
    assert_as_accurate_as_plain_pytorch(stats, logits, targets, dlogits, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked_derivative", [0.0, 1e30, math.inf, math.nan])
def test_masked_logits_contribute_exactly_nothing(token_stats, draw, masked_derivative, softcap):
    logits, targets, dlogits = draw(4, 4 * BLOCK)
    keep = torch.zeros(4 * BLOCK, dtype=torch.bool, device=logits.device)
    keep[BLOCK + 1::2] = True  # no logit of the first tile, every other one after it
    logits[:, ~keep], dlogits[:, ~keep] = -math.inf, masked_derivative
    targets = keep.nonzero()[:, 0][targets % int(keep.sum())]
    stats = token_stats(logits, targets, dlogits, softcap=softcap)
    kept = logits[:, keep], keep.cumsum(0)[targets] - 1, dlogits[:, keep]
    assert_as_accurate_as_plain_pytorch(stats, *kept, softcap=softcap)


def test_all_but_one_logit_masked(token_stats, draw):
    logits, targets, dlogits = draw(3, 3 * BLOCK)
    only = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    for field in token_stats(logits.masked_fill(~only, -math.inf), targets, dlogits)[:4]:
        assert (field == 0).all()


def test_masked_targets_and_rows(token_stats, draw):
    logits, targets, dlogits = draw(3, 2 * BLOCK)
    logits[0, targets[0]] = -math.inf
    logits[1] = -math.inf
    stats = token_stats(logits, targets, dlogits)
    assert stats.logp[0] == -math.inf and all(field[0].isfinite() for field in stats[1:4])
    assert all(field[1].isnan() for field in stats[:4])
    last = TokenStats(*(field[2:] for field in stats[:4]))
    assert_as_accurate_as_plain_pytorch(last, logits[2:], targets[2:], dlogits[2:])


def test_masks_of_the_smallest_float(token_stats, draw):
    """finfo.min is a common mask; divided by a temperature below 1 it leaves the range of float32."""
    logits, targets, dlogits = draw(3, 2 * BLOCK)
    masked = logits.clone()
    masked[:, ::2] = torch.finfo(torch.float32).min
    targets = targets // 2 * 2 + 1
    stats = token_stats(masked, targets, dlogits, temperature=0.5)
    kept = logits[:, 1::2], targets // 2, dlogits[:, 1::2]
    assert_as_accurate_as_plain_pytorch(stats, *kept, temperature=0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible_and_in_its_row(token_stats, draw, bad):
    logits, targets, dlogits = draw(4, 2 * BLOCK)
    logits[1, 5], dlogits[2, 5] = bad, bad
    stats = token_stats(logits, targets, dlogits)
    assert all(field[1].isnan() for field in stats[:4])
    assert not stats.dlogp[2].isfinite() and not stats.dentropy[2].isfinite() and stats.entropy[2].isfinite()
    assert all(field[[0, 3]].isfinite().all() for field in stats[:4])


def test_any_strides_and_integer_targets(token_stats, draw):
    logits, targets, dlogits = draw(6, 2 * BLOCK + 3)
    want = token_stats(logits, targets, dlogits)
    room = torch.full((6, 3, 2 * BLOCK + 9), math.nan, device=logits.device)
    room[:, 1, 4:-2] = logits
    views = room[:, 1, 4:-2], targets.to(torch.int32).repeat_interleave(2)[::2], dlogits.T.contiguous().T
    for got, expected in zip(token_stats(*views)[:4], want):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    expanded = logits[:1].expand(6, -1)
    for got, expected in zip(token_stats(expanded, targets, dlogits)[:4],
                             token_stats(expanded.contiguous(), targets, dlogits)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_logits_and_derivatives_may_differ_in_dtype(token_stats, draw):
    logits, targets, dlogits = draw(4, BLOCK + 5)
    stats = token_stats(logits.bfloat16(), targets, dlogits)
    assert_as_accurate_as_plain_pytorch(stats, logits.bfloat16(), targets, dlogits)


def test_without_a_derivative_there_are_none(token_stats, draw):
    logits, targets, dlogits = draw(4, 2 * BLOCK + 5)
    primal, first = token_stats(logits, targets), token_stats(logits, targets, dlogits)
    assert primal[2:] == (None,) * 4
    for got, want in zip(primal[:2], first):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_probabilities_sum_to_one_and_their_derivatives_to_zero(token_stats, draw):
    vocabulary = BLOCK + 9
    logits, _, dlogits = draw(1, vocabulary)
    every = torch.arange(vocabulary, device=logits.device)
    stats = token_stats(logits.expand(vocabulary, -1), every, dlogits.expand(vocabulary, -1))
    p = stats.logp.double().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert (p * stats.dlogp).sum().item() == pytest.approx(0, abs=1e-6)
    assert stats.entropy[0].item() == pytest.approx(-(p * stats.logp).sum().item(), rel=1e-6)
    assert stats.dentropy[0].item() == pytest.approx(-(p * stats.logp * stats.dlogp).sum().item(), rel=1e-5)


def test_linear_in_the_derivative(token_stats, draw):
    logits, targets, first = draw(5, 2 * BLOCK + 5)
    second = draw(5, 2 * BLOCK + 5)[2]
    a, b, both = (token_stats(logits, targets, d) for d in (first, second, 2 * first - 3 * second))
    for name in ("dlogp", "dentropy"):
        torch.testing.assert_close(getattr(both, name), 2 * getattr(a, name) - 3 * getattr(b, name),
                                   rtol=1e-5, atol=1e-5)


def test_inputs_are_left_alone_and_no_graph_is_built(token_stats, draw):
    inputs = draw(3, BLOCK + 5)
    before = [tensor.clone() for tensor in inputs]
    stats = token_stats(inputs[0].requires_grad_(), inputs[1], inputs[2], softcap=3.0)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before))
    assert not any(field.requires_grad for field in stats[:4])


# What only the kernel promises.

def test_bits_of_a_row_do_not_depend_on_the_batch_or_the_run(draw):
    logits, targets, dlogits = draw(5, 3 * BLOCK + 5)
    batch = run_kernel(logits, targets, dlogits)
    again = run_kernel(logits, targets, dlogits)
    for row in range(5):
        alone = run_kernel(logits[row:row + 1], targets[row:row + 1], dlogits[row:row + 1])
        for name in FIELDS[:4]:
            value = getattr(batch, name)[row]
            assert getattr(alone, name)[0] == value and getattr(again, name)[row] == value


def test_nothing_is_left_unwritten(draw, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    assert all(field.isfinite().all() for field in run_kernel(*draw(4, BLOCK + 5))[:4])
    assert all(field.isfinite().all() for field in run_kernel(*draw(4, BLOCK + 5)[:2])[:2])


@pytest.mark.parametrize("target", [-1, 2 * BLOCK, 2**40, -(2**40)])
def test_a_target_out_of_range_makes_its_row_nan(draw, target):
    logits, targets, dlogits = draw(3, 2 * BLOCK)
    targets[1] = target  # 2**40 elements on would be outside any allocation: reading there ends the process
    stats = run_kernel(logits, targets, dlogits)
    assert all(field[1].isnan() and field[[0, 2]].isfinite().all() for field in stats[:4])


def test_validate_raises_for_a_target_out_of_range(draw):
    logits, targets, dlogits = draw(3, 2 * BLOCK)
    targets[1] = 2 * BLOCK
    with pytest.raises(ValueError, match=rf"targets\[1\] is {2 * BLOCK}"):
        public_token_stats(logits, targets, dlogits, validate=True)


def test_the_public_function_takes_the_kernel_where_it_can(draw, monkeypatch):
    logits, targets, dlogits = draw(4, BLOCK + 5)
    want = run_kernel(logits, targets, dlogits, temperature=0.7, softcap=3.0)

    def fail(*args, **options):
        raise AssertionError("the reference was called")

    with monkeypatch.context() as patch:
        patch.setattr(reference, "stats_of_logits", fail)
        got = public_token_stats(logits, targets, dlogits, temperature=0.7, softcap=3.0)
        assert all(torch.equal(a, b) for a, b in zip(got[:4], want))
    assert public_token_stats(logits.double(), targets, dlogits).logp.dtype == torch.float64
    assert public_token_stats(logits, targets, dlogits, dlogits).d2logp is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moving", ["hidden", "weight", "both"])
def test_heads_go_through_the_kernel_in_float32(draw, device, dtype, moving, monkeypatch):
    hidden, _, dhidden = draw(7, 24, dtype)
    weight, _, dweight = draw(2 * BLOCK + 3, 24, dtype)
    bias, dbias = torch.randn(2, 2 * BLOCK + 3, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    targets = torch.arange(7, device=device)
    dhidden, dweight = (None if moving == "weight" else dhidden), (None if moving == "hidden" else dweight)
    monkeypatch.setattr(reference, "LOGITS_CHUNK", 3 * len(weight))
    monkeypatch.setattr(reference, "PRODUCT_BLOCK", 50)
    stats = linear_token_stats(hidden, weight, targets, dhidden, dweight, bias=bias, dbias=dbias,
                               softcap=20.0)
    h, w, dh, dw = (t if t is None else t.double() for t in (hidden, weight, dhidden, dweight))
    dlogits = dbias.double() + (0 if dh is None else dh @ w.T) + (0 if dw is None else h @ dw.T)
    truth = plain_pytorch(h @ w.T + bias.double(), targets, dlogits, softcap=20.0)
    for name, want in truth.items():
        torch.testing.assert_close(getattr(stats, name).double(), want, rtol=1e-5,
                                   atol=1e-5 * want.abs().max().item())


@needs_gpu
def test_a_new_number_of_rows_compiles_nothing(draw):
    logits, targets, dlogits = draw(64, 4096)
    run_kernel(logits, targets, dlogits)
    cache = kernel._token_stats_kernel.device_caches[torch.cuda.current_device()][0]
    compiled = len(cache)
    for rows in (1, 2, 16, 33, 64):
        run_kernel(logits[:rows], targets[:rows], dlogits[:rows])
    assert len(cache) == compiled


@needs_gpu
def test_more_than_two_to_the_31_elements(device):
    rows, vocabulary = 2**31 // 65536 + 3, 65536
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=device)
    logits[-1, 17] = 8.0
    targets = torch.full((rows,), 17, device=device)
    stats = run_kernel(logits, targets, logits)
    want = plain_pytorch(logits[-2:], targets[-2:], logits[-2:])
    for name, value in want.items():
        torch.testing.assert_close(getattr(stats, name)[-2:].double(), value, rtol=1e-5, atol=1e-6)
