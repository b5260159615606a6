"""Rows with given tokens between generated ones: every pass against each rollout alone, unpacked, and definitions."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from models import InFloat64, quiet_fallback, random_batch, random_direction, random_model, random_rows
from torch.func import functional_call, jvp

from dentropy import Policy, measure, policy_gradient_direction, slope
from dentropy.passes.microbatches import TokenBudget, walk
from dentropy.passes.noise_floor import sampled_rollouts
from dentropy.passes.parameter_attribution import parameter_attribution
from dentropy.passes.reverse_mode import gradient

pytestmark = quiet_fallback


def distributions(model, batch, i, weights):
    """log p over the vocabulary for every token of rollout i but the first, from the model on all of it."""
    tokens, _ = batch.row(i)
    logits = functional_call(model, weights, (), dict(input_ids=torch.tensor([tokens]), use_cache=False)).logits[0]
    return torch.log_softmax(logits[:-1] / float(batch.temperatures[i]), -1)


def one_alone(model, batch, i, weights):
    """(log-probability, entropy) of the generated tokens of rollout i."""
    (tokens, generated), logp = batch.row(i), distributions(model, batch, i, weights)
    chosen = logp.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    keep = torch.tensor(generated[1:])
    return chosen[keep], -(logp.exp() * logp).sum(-1)[keep]


def along(model, direction, found):
    """`found` of the weights as a function of η."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return lambda eta: found(
        {name: p + eta * direction.tensors.get(name, torch.zeros_like(p)) for name, p in weights.items()}
    )


def fisher(model, batch, i, direction):
    """Σ over the generated tokens of E_p (d log p/dη)²."""
    zero, one = torch.zeros(()).double(), torch.ones(()).double()
    logp, dlogp = jvp(along(model, direction, lambda weights: distributions(model, batch, i, weights)), (zero,), (one,))
    keep = torch.tensor(batch.row(i)[1][1:])
    return float((logp.exp() * dlogp**2).sum(-1)[keep].sum())


def derivatives(model, batch, i, direction, order):
    """[(logp, h), (dlogp, dh), (d2logp, d2h)] up to `order`, each [T_i]."""
    zero, one = torch.zeros(()).double(), torch.ones(()).double()
    values = along(model, direction, lambda weights: one_alone(model, batch, i, weights))

    if order == 1:
        found = jvp(values, (zero,), (one,))
    else:
        (value, first), (_, second) = jvp(lambda eta: jvp(values, (eta,), (one,)), (zero,), (one,))
        found = (value, first, second)
    return [[x.numpy() for x in pair] for pair in found]


def by_definition(tokens) -> dict[str, float]:
    """Every column of one rollout, written out; later and earlier tokens are the generated ones, turns or not."""
    (logp, h), (dlogp, dh), *second = tokens
    n = len(logp)
    found = {
        "n_tokens": n,
        "logp": logp.sum(),
        "entropy": h.sum(),
        "dlogp": dlogp.sum(),
        "dentropy": dh.sum(),
        "entropy_dlogp": (h * dlogp).sum(),
        "entropy_to_go": sum(dlogp[k] * h[k + 1 :].sum() for k in range(n)),
        "length_to_go": sum(dlogp[k] * (n - 1 - k) for k in range(n)),
    }
    if not second:
        return found
    ((d2logp, d2h),) = second
    before = [dlogp[:j].sum() for j in range(n)]
    before_2 = [before[j] ** 2 + d2logp[:j].sum() for j in range(n)]
    return found | {
        "d2logp": d2logp.sum(),
        "d2entropy": d2h.sum(),
        "dentropy_to_go": sum(before[j] * dh[j] for j in range(n)),
        "entropy_to_go_2": sum(before_2[j] * h[j] for j in range(n)),
        "length_to_go_2": sum(before_2),
    }


@cache
def case(name):
    """A model in float64, rows of three temperatures and a direction."""
    model = random_model(name).double()
    return model, random_rows(n_temperatures=3), random_direction(model)


QUICK, SLOW = [("llama", 2), ("gemma2", 1), ("mamba2", 1)], [("llama", 1), ("mistral", 1)]


@pytest.mark.parametrize("name, order", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_every_column_is_that_of_each_rollout_alone(name, order):
    model, batch, direction = case(name)
    batch = batch if order == 1 else batch.take(range(6))  # the reference's second derivatives are slow
    settings = dict(order=order, second_order="nested", keep_tokens=True, token_budget=60)
    with InFloat64():
        sums = measure(Policy(model), batch, direction, **settings)
        model.set_attn_implementation("eager")
        alone = [derivatives(model, batch, i, direction, order) for i in range(len(batch))]
        variances = [fisher(model, batch, i, direction) for i in range(len(batch))]
    expected = [by_definition(tokens) | {"fisher": v} for tokens, v in zip(alone, variances, strict=True)]
    assert set(sums.columns()) - {"group", "rollout"} == set(expected[0])
    for column in expected[0]:
        truth = np.array([row[column] for row in expected])
        error = np.abs(getattr(sums, column) - truth).max()
        assert error <= 1e-11 * max(np.sqrt(np.mean(truth**2)), 1e-30), column
    for order, names in enumerate((("logp", "entropy"), ("dlogp", "dentropy"))):
        for k, kept in enumerate(names):
            truth = np.concatenate([tokens[order][k] for tokens in alone])
            np.testing.assert_allclose(getattr(sums.tokens, kept).numpy(), truth, rtol=1e-9, atol=1e-11)


def test_the_columns_at_moved_weights_and_from_differences():
    model, batch, direction = case("llama")
    with InFloat64():
        policy = Policy(model)
        nested = measure(policy, batch, direction, order=2, second_order="nested")
        difference = measure(policy, batch, direction, order=2)
        moved = measure(policy, batch, direction, eta=0.01)
        weights = {name: p.detach() + 0.01 * direction.tensors[name] for name, p in model.named_parameters()}
        model.set_attn_implementation("eager")
        alone = [[x.sum().item() for x in one_alone(model, batch, i, weights)] for i in range(len(batch))]
    np.testing.assert_allclose(np.transpose(alone), [moved.logp, moved.entropy], rtol=1e-11, atol=1e-11)
    for column in ("d2logp", "d2entropy", "entropy_to_go_2"):
        exact = getattr(nested, column)
        assert np.abs(getattr(difference, column) - exact).max() <= 1e-5 * np.sqrt(np.mean(exact**2)), column


def test_reverse_mode_sums_generated_tokens_at_their_temperatures():
    model, batch, _ = case("gemma2")
    a, b = np.random.default_rng(0).normal(size=(2, batch.n_tokens))
    with InFloat64():
        found = gradient(Policy(model), batch, list(model.parameters()), a, b, token_budget=30)
        model.set_attn_implementation("eager")
        parts = [one_alone(model, batch, i, dict(model.named_parameters())) for i in range(len(batch))]
        logp, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        total = (torch.from_numpy(a) * entropy + torch.from_numpy(b) * logp).sum()
        expected = torch.autograd.grad(total, list(model.parameters()))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_a_policy_gradient_with_an_advantage_for_each_token():
    model = random_model("llama")
    plain, advantage = random_rows(), np.random.default_rng(1).normal(size=random_rows().n_tokens)
    model.set_attn_implementation("eager")
    parts = [one_alone(model, plain, i, dict(model.named_parameters()))[0] for i in range(len(plain))]
    loss = -(torch.from_numpy(advantage).float() * torch.cat(parts)).sum() / plain.n_tokens
    names = dict(model.named_parameters())
    expected = torch.autograd.grad(loss, list(names.values()))
    batch = dataclasses.replace(plain, advantage=advantage)
    direction = policy_gradient_direction(Policy(model), batch, step_size=1e-3, optimizer="sgd")
    for name, g in zip(names, expected, strict=True):
        torch.testing.assert_close(direction.tensors[name], -g, rtol=1e-3, atol=1e-6)


def test_parameters_share_the_slope_and_the_noise_floor_sees_rows_with_generated_tokens():
    model, batch, direction = case("llama")
    with InFloat64():
        policy = Policy(model)
        sums = measure(policy, batch, direction, keep_tokens=True)
        shares = parameter_attribution(policy, batch, direction, sums)
    assert sum(shares.values()) == pytest.approx(slope(sums).value, rel=1e-9)
    assert 0 not in sampled_rollouts(batch) and batch.response_lens[0] == 0


def test_a_microbatch_has_one_temperature_and_every_rollout_runs_once():
    batch = random_rows(rollouts=30, n_temperatures=3)
    walked = [m for m, _ in walk(batch, TokenBudget(60, torch.device("cpu")), lambda m: None)]
    for microbatch in walked:
        assert set(batch.temperatures[microbatch.rollouts]) == {microbatch.temperature}
    assert sorted(i for m in walked for i in m.rollouts) == np.flatnonzero(batch.response_lens).tolist()
    assert sorted(i for m in walked for i in m.places) == list(range(batch.n_tokens))
    assert max(batch.row_lens[walked[0].rollouts]) == batch.row_lens[batch.response_lens > 0].max()


def test_one_temperature_for_each_of_equal_rows_is_the_same_bits():
    """A column of equal temperatures is one temperature, and prompts with responses are rows."""
    model, batch = random_model("llama"), random_batch(temperature=0.7)
    rows = [batch.row(i) for i in range(len(batch))]
    again = type(batch).from_rows(*zip(*rows, strict=True), group=batch.group, temperature=[0.7] * len(batch))
    policy, direction = Policy(model), random_direction(model)
    one, other = (measure(policy, x, direction) for x in (batch, again))
    for column, values in one.columns().items():
        assert np.array_equal(values, getattr(other, column)), column


def test_what_stands_behind_the_last_generated_token_changes_nothing_not_even_the_positions_needed():
    model = random_model("llama")
    rows, masks = [[3, 5, 6, 7] + [9] * n for n in (0, 90)], [[0, 1, 0, 1] + [0] * n for n in (0, 90)]
    direction = random_direction(model)
    one, other = (
        measure(Policy(model), random_rows().from_rows([row], [mask]), direction)
        for row, mask in zip(rows, masks, strict=True)
    )
    assert all(np.array_equal(values, getattr(other, column)) for column, values in one.columns().items())
