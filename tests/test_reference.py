"""The definition against PyTorch's forward mode, finite differences, smaller vocabularies and sums by hand."""

import inspect
import math

import numpy as np
import pytest
import torch
from draws import MOVING, TRANSFORMS, head, logits_and_tangents, token_values
from truth import FIELDS, along_the_path, assert_all_close, plain_pytorch

import dentropy
from dentropy import TokenStats, reference


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_order_against_nested_forward_mode(order, transform):
    inputs = logits_and_tangents()[: 2 + order]
    assert_all_close(reference.token_stats(*inputs, **transform), plain_pytorch(*inputs, **transform), rtol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_derivatives_against_finite_differences_of_the_two_values(transform):
    logits, targets, dlogits, d2logits = logits_and_tangents()
    step = 3e-3
    values = torch.stack(
        [
            torch.stack(reference.token_stats(logits + eta * dlogits + eta**2 / 2 * d2logits, targets, **transform)[:2])
            for eta in step * torch.arange(-2.0, 3.0)
        ],
        -1,
    )
    first, second = (
        values @ torch.tensor(weights, dtype=torch.float64)
        for weights in ([1 / 12, -2 / 3, 0, 2 / 3, -1 / 12], [-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12])
    )
    stats = reference.token_stats(logits, targets, dlogits, d2logits, **transform)
    want = dict(zip(FIELDS, (*values[..., 2], *first / step, *second / step**2)))
    assert_all_close(stats._replace(fisher=None), want, rtol=1e-7)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_fisher_is_twice_the_divergence_of_a_small_step(transform):
    """KL(p_0 ‖ p_η) / η² → Var ż / 2, summed over the vocabulary; a step to either side leaves out the odd terms."""
    logits, targets, dlogits, _ = logits_and_tangents()
    step = 1e-3

    def log_probs(eta):
        return torch.log_softmax(along_the_path(eta, logits, dlogits, **transform), -1)

    here = log_probs(0.0)
    divergences = [(here.exp() * (here - log_probs(eta))).sum(-1) for eta in (step, -step)]
    fisher = reference.token_stats(logits, targets, dlogits, **transform).fisher
    torch.testing.assert_close(fisher, sum(divergences) / step**2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_masked_tokens_are_outside_the_vocabulary(transform):
    """It is as if they were not there, whatever their derivatives; sampled all the same, they have logp −inf."""
    logits, targets, *tangents = logits_and_tangents()
    masked, targets = slice(1, None, 2), targets // 2 * 2
    kept = [tensor[:, ::2] for tensor in (logits, *tangents)]
    want = plain_pytorch(kept[0], targets // 2, *kept[1:], **transform)
    logits[:, masked] = -math.inf
    for value in (0.0, 1e30, math.inf, math.nan):
        for tangent in tangents:
            tangent[:, masked] = value
        assert_all_close(reference.token_stats(logits, targets, *tangents, **transform), want, rtol=1e-12)
    stats = reference.token_stats(logits, targets + 1, *tangents, **transform)
    assert (stats.logp == -math.inf).all()
    torch.testing.assert_close(stats.entropy, want["entropy"])


@pytest.mark.parametrize("transform", [{}, dict(softcap=3.0)], ids=str)
def test_rows_without_a_token_or_with_an_unknown_target_are_nan(transform):
    logits, targets, *tangents = logits_and_tangents()
    want = reference.token_stats(logits, targets, *tangents, **transform)
    logits[1] = -math.inf
    targets[2], targets[3] = -1, 300  # refused on a CPU; other devices do not ask
    stats = reference._closed_form(logits, targets, *tangents, 1.0, transform.get("softcap"))
    for got, field in zip(stats, want):
        assert got[1:4].isnan().all()
        assert torch.equal(got[[0, 4, 5]], field[[0, 4, 5]])


def head_by_forward_mode(hidden, weight, targets, bias=None, dhidden=None, dweight=None, dbias=None, **transform):
    """Through torch.func.jvp of the head itself."""
    pairs = [pair for pair in ((hidden, dhidden), (weight, dweight), (bias, dbias)) if pair[0] is not None]
    tangents = tuple(torch.zeros_like(x) if dx is None else dx for x, dx in pairs)
    z, dz = torch.func.jvp(torch.nn.functional.linear, tuple(x for x, _ in pairs), tangents)
    return plain_pytorch(z, targets, dz, **transform)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("moving", MOVING, ids="+".join)
def test_heads(moving, transform):
    inputs = head(moving=moving)
    stats = reference.linear_token_stats(**inputs, **transform)
    assert_all_close(stats, head_by_forward_mode(**inputs, **transform), rtol=1e-12)


def test_heads_without_bias_and_heads_that_stand_still():
    inputs = head(moving=("dhidden", "dweight"))
    del inputs["bias"]
    want = head_by_forward_mode(**inputs)
    assert_all_close(reference.linear_token_stats(**inputs), want, rtol=1e-12)
    still = {name: inputs[name] for name in ("hidden", "weight", "targets")}
    assert_all_close(reference.linear_token_stats(**still), {name: want[name] for name in FIELDS[:2]}, rtol=1e-12)


def test_precision_is_that_of_the_widest_input():
    logits, targets, *tangents = logits_and_tangents(dtype=torch.bfloat16)
    assert {field.dtype for field in reference.token_stats(logits, targets, *tangents)} == {torch.float32}
    tangents[1] = tangents[1].double()
    assert {field.dtype for field in reference.token_stats(logits, targets, *tangents)} == {torch.float64}
    assert reference.linear_token_stats(**head(torch.float16)).dlogp.dtype == torch.float32
    wide = head(torch.float16) | dict(dbias=head()["dbias"])
    assert reference.linear_token_stats(**wide).dlogp.dtype == torch.float64


def test_no_rows():
    assert all(field.shape == (0,) for field in reference.token_stats(*logits_and_tangents(rows=0)))
    assert reference.linear_token_stats(**head(rows=0)).dentropy.shape == (0,)


def test_sums_by_hand():
    """Two rollouts of three tokens and of one, and one without."""
    h, dlogp = torch.tensor([1.0, 2.0, 4.0, 7.0]), torch.tensor([1.0, 10.0, 100.0, 3.0])
    stats = TokenStats(-h, h, dlogp, 2 * dlogp, 3 * dlogp, 5 * dlogp, 7 * dlogp)
    sums = reference.sequence_sums(stats, [0, 3, 3, 4], group=[5, 5, 8]).columns()
    want = dict(
        n_tokens=[3, 0, 1],
        logp=[-7, 0, -7],
        entropy=[7, 0, 7],
        dlogp=[111, 0, 3],
        dentropy=[222, 0, 6],
        entropy_dlogp=[1 * 1 + 2 * 10 + 4 * 100, 0, 7 * 3],
        entropy_to_go=[1 * (2 + 4) + 10 * 4, 0, 0],
        length_to_go=[1 * 2 + 10 * 1, 0, 0],
        fisher=[777, 0, 21],
        d2logp=[333, 0, 9],
        d2entropy=[555, 0, 15],
        dentropy_to_go=[1 * 20 + 11 * 200, 0, 0],  # what comes before: 0, 1, 11
        entropy_to_go_2=[(1 + 3) * 2 + (121 + 33) * 4, 0, 0],
        length_to_go_2=[(1 + 3) + (121 + 33), 0, 0],
        group=[5, 5, 8],
        rollout=[0, 1, 2],
    )
    assert {name: column.tolist() for name, column in sums.items()} == want
    assert list(sums) == list(want)


def test_sums_of_no_sequences_and_no_tokens():
    nothing = token_values(0)
    assert len(reference.sequence_sums(nothing, [0])) == 0
    assert reference.sequence_sums(nothing, [0, 0]).entropy_to_go.tolist() == [0]
    assert reference.sequence_sums(nothing, [0, 0]).logp.dtype == np.float64


@pytest.mark.parametrize("name", ["token_stats", "linear_token_stats", "sequence_sums"])
def test_the_arguments_are_those_of_the_public_function(name):
    ours, public = (inspect.signature(getattr(module, name)) for module in (reference, dentropy))
    assert list(ours.parameters.values()) == list(public.parameters.values())


def test_a_process_group_is_refused():
    with pytest.raises(ValueError, match=r"^process_group: 'ranks', expected None"):
        reference.linear_token_stats(**head(), process_group="ranks")
