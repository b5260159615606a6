"""The plain path against the reference in float64, its chunks, and the heads it makes logits from.

What it shares with the kernels (hard rows, masks, strides, in float32) is tested in kernels/test_token_stats.py.
"""

import math

import pytest
import torch
from draws import MOVING, TRANSFORMS, head, logits_and_tangents, token_values
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from truth import assert_all_close, assert_as_accurate_as_plain_pytorch, reference_in_float64

from dentropy import reference
from dentropy.stats import plain


def truth_of_head(inputs, **transform):
    return reference_in_float64("linear_token_stats", **inputs, **transform)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_order(order, transform):
    inputs = logits_and_tangents()[: 2 + order]
    stats = plain.token_stats(*inputs, **transform)
    assert all(field.dtype == torch.float64 for field in stats if field is not None)
    assert_all_close(stats, reference_in_float64("token_stats", *inputs, **transform), rtol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_rows_in_float32(dtype, transform):
    inputs = logits_and_tangents(vocabulary=5000, dtype=dtype)
    assert_as_accurate_as_plain_pytorch(plain.token_stats(*inputs, **transform), *inputs, **transform)


def test_what_all_derivatives_of_a_row_have_in_common_costs_no_digits():
    """Their mean is 1e7 times what tells them apart, so that its own rounding is of that size."""
    logits, targets, dlogits, _ = logits_and_tangents(dtype=torch.float32)
    dlogits = 1000 + 1e-4 * (logits + dlogits)
    inputs = logits, targets, dlogits, 1e-8 * logits
    assert_all_close(plain.token_stats(*inputs), reference_in_float64("token_stats", *inputs), rtol=2e-5)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_masked_tokens_empty_rows_and_unknown_targets(transform):
    """As the reference has them; what derivatives are at a masked token is nothing to either."""
    logits, targets, *tangents = logits_and_tangents()
    logits[:, 1::2] = -math.inf
    for tangent in tangents:
        tangent[:, 3::4] = math.inf
    targets = targets // 4 * 4
    targets[0] += 1
    stats = plain.token_stats(logits, targets, *tangents, **transform)
    assert stats.logp[0] == -math.inf
    assert all(field[1:].isfinite().all() for field in stats)
    for got, want in zip(stats, reference.token_stats(logits, targets, *tangents, **transform)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    logits[1] = -math.inf
    targets[2], targets[3] = -1, 300  # refused on a CPU; other devices do not ask
    unchecked = plain.stats_of_logits(logits, targets, *tangents, **dict(temperature=1.0, softcap=None) | transform)
    for got, want in zip(unchecked, stats):
        assert got[1:4].isnan().all()
        assert torch.equal(got[4:], want[4:])


def test_a_row_that_is_not_finite_hides_no_mask_in_its_chunk():
    logits, targets, *tangents = logits_and_tangents()
    logits[:, 1::2] = -math.inf
    logits[0, 0] = math.nan
    stats = plain.token_stats(logits, targets // 2 * 2, *tangents)
    assert all(field[0].isnan() and field[1:].isfinite().all() for field in stats)


@pytest.mark.parametrize("chunk_rows", [1, 4, 6, 100])
def test_chunks_change_nothing(chunk_rows, monkeypatch):
    inputs = logits_and_tangents()
    truth = reference_in_float64("token_stats", *inputs)
    monkeypatch.setattr(plain, "CPU_CHUNK", chunk_rows * 300)
    assert_all_close(plain.token_stats(*inputs), truth, rtol=1e-12)


def test_no_rows():
    assert all(field.shape == (0,) for field in plain.token_stats(*logits_and_tangents(rows=0)))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("moving", MOVING, ids="+".join)
def test_heads(moving, transform):
    inputs = head(moving=moving)
    assert_all_close(plain.linear_token_stats(**inputs, **transform), truth_of_head(inputs, **transform), rtol=1e-12)


def test_head_without_bias_and_head_that_stands_still():
    inputs = head(moving=("dhidden", "dweight"))
    del inputs["bias"]
    assert_all_close(plain.linear_token_stats(**inputs), truth_of_head(inputs), rtol=1e-12)
    still = head(moving=())
    assert_all_close(plain.linear_token_stats(**still), truth_of_head(still), rtol=1e-12)
    assert plain.linear_token_stats(**head(rows=0)).dentropy.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_heads_never_round_their_logits(dtype):
    """Rounding the logits to half precision costs 1e-3 to 1e-2 here."""
    inputs = head(dtype, width=64, vocabulary=500)
    stats = plain.linear_token_stats(**inputs, temperature=4.0)
    assert stats.logp.dtype == torch.float32
    assert_all_close(stats, truth_of_head(inputs, temperature=4.0), rtol=1e-5)


def test_products_that_come_out_in_float32_are_taken_in_blocks(monkeypatch):
    """The way of half precision on CUDA, with torch.mm and its out_dtype played by float64 on the CPU."""
    inputs = head(torch.bfloat16)
    truth = truth_of_head(inputs)

    def product(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16 and b.shape[1] <= 10
        return (a.double() @ b.double()).to(out_dtype)

    monkeypatch.setattr(plain, "_products_in_float32", lambda *factors: True)
    monkeypatch.setattr(plain, "PRODUCT_BLOCK", 10)
    monkeypatch.setattr(torch, "mm", product)
    assert_all_close(plain.linear_token_stats(**inputs), truth, rtol=1e-5)


def test_dtypes_of_a_head_may_differ():
    inputs = head(torch.bfloat16)
    inputs |= {name: inputs[name].float() for name in ("dhidden", "dweight", "bias", "dbias")}
    assert_all_close(plain.linear_token_stats(**inputs), truth_of_head(inputs), rtol=1e-5)


def test_logits_of_all_rows_never_exist(monkeypatch):
    """With chunks of 2 rows the largest tensor is a chunk's buffer: logits, tangents, as much scratch."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            Largest.elements = max(Largest.elements, *sizes, 0)
            return out

    inputs = head(rows=50, width=4)
    monkeypatch.setattr(plain, "LOGITS_CHUNK", 2 * 77)
    with Largest():
        stats = plain.linear_token_stats(**inputs)
    assert 0 < Largest.elements <= 4 * (2 * 77) < 50 * 77
    assert_all_close(stats, truth_of_head(inputs), rtol=1e-12)


def test_sums_whatever_the_device_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the public function would take the kernel
    stats, ends = token_values(53), [0, 20, 20, 53]
    want = reference.sequence_sums(stats, ends).columns()
    for name, column in plain.sequence_sums(stats, ends).columns().items():
        torch.testing.assert_close(torch.from_numpy(column), torch.from_numpy(want[name]), rtol=1e-13, atol=1e-12)


def low(first, second, *others):
    """The first shard far below the second, and what moves there far from what moves elsewhere."""
    return (first[0] - 1e3, first[1] + 1e4), second, *others


SHARDS = {
    "as drawn": lambda *shards: shards,
    "a common part of the derivatives": lambda *shards: [(z, 30 + 0.01 * dz) for z, dz in shards],
    "the first far below": low,
    "the last far below": lambda *shards: low(*shards[::-1])[::-1],
    "the first empty": lambda first, *others: ((first[0] - math.inf, first[1]), *others),
}


@pytest.mark.parametrize("transform", [{}, dict(temperature=0.6)], ids=str)
@pytest.mark.parametrize("case", SHARDS)
def test_states_of_shards_merge(case, transform):
    """In float32, without the processes of test_vocabulary_parallel."""
    logits, targets, dlogits, _ = logits_and_tangents(dtype=torch.float32)
    targets = 100 + targets % 150
    shards = SHARDS[case](*zip(logits.split([100, 150, 50], 1), dlogits.split([100, 150, 50], 1)))
    settings = dict(scale=1 / transform.get("temperature", 1.0), softcap=None)
    states = [
        plain._state_of_logits(z, targets - start, dz, **settings) for start, (z, dz) in zip((0, 100, 250), shards)
    ]
    logits, dlogits = (torch.cat(columns, 1) for columns in zip(*shards))
    truth = reference_in_float64("token_stats", logits, targets, dlogits, **transform)
    assert_all_close(plain._stats_of_states(torch.stack(states), settings["scale"]), truth, rtol=2e-6)
