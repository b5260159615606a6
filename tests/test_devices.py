"""All that runs a policy, on the CPU at a tiny size and, where there is one, on a GPU at a larger one.

Weights, direction and rollouts are made on the CPU, and so is the truth: float64, one rollout at a time. No error may
be more than twice that of plain PyTorch on the same device in the same dtype.
"""

import copy
import warnings
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import one_at_a_time
import pytest
import torch
from models import random_direction, random_model
from one_at_a_time import TEMPERATURE, token_values

from dentropy import (
    Direction,
    PackedBatch,
    Policy,
    importance,
    measure,
    parameter_attribution,
    policy_gradient_direction,
    sample,
    sequence_sums,
    slope,
)
from dentropy.estimators.attribution import token_coefficients
from dentropy.experiment.probe import probe
from dentropy.passes.forward_mode import moved_weights
from dentropy.passes.microbatches import TokenBudget, in_rollout_order, walk
from dentropy.passes.reverse_mode import gradient
from dentropy.stats.sequence_sums import plain_columns

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
MODELS = ["llama", "mistral", "gemma2"]  # plain; a sliding window; softcaps, a window in every other layer
DTYPES = [torch.float32, torch.bfloat16]
# On a GPU long enough for several blocks of queries, keys and logits in every kernel.
SIZES = {
    "cpu": {},
    "cuda": dict(
        hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=3000, sliding_window=50, initializer_range=0.07,
        max_position_embeddings=512,
    ),
}  # fmt: skip
SLOW_ON_THE_CPU = [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]]  # where other tests hold the same
LONGEST = {"cpu": 12, "cuda": 200}
ETA = 0.03
FLOAT32 = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.filterwarnings("ignore:policy. weights are torch.bfloat16, in which")


@cache
def case(name, device, dtype):
    """A policy on `device`, its weights in float64 on the CPU, rollouts, and a direction that stays on the CPU."""
    model = random_model(name, **SIZES[device]).to(dtype)
    exact = copy.deepcopy(model).double()
    direction = random_direction(model)
    rng, longest = np.random.default_rng(0), LONGEST[device]
    vocabulary = model.config.vocab_size
    lengths = [0, 1, longest, *rng.integers(2, longest, 3)]
    prompts = [rng.integers(3, vocabulary, rng.integers(1, longest // 2)).tolist() for _ in range(2)]
    batch = PackedBatch.from_lists(
        [prompts[i // 3] for i in range(6)],
        [rng.integers(2, vocabulary, n).tolist() for n in lengths],
        group=[i // 3 for i in range(6)],
        temperature=TEMPERATURE,
        advantage=rng.normal(size=6),
    )
    model.to(device)
    return SimpleNamespace(
        device=device, model=model, exact=exact, policy=Policy(model), batch=batch, direction=direction
    )


@cache
def by_plain_pytorch(name, device, dtype, *request):
    """(truth, what plain PyTorch makes of it on the device)."""
    found = case(name, device, dtype)
    return tuple(
        token_values(model, found.batch, tangents_of(model, found.direction), *request)
        for model in (found.exact, found.model)
    )


def tangents_of(model, direction):
    return {name: v.to(model.device, model.dtype) for name, v in direction.tensors.items()}


def rms(x) -> float:
    return float(x.double().square().mean().sqrt())


def assert_as_near(found, truth, plain, what):
    """Twice plain PyTorch's error at most, and a few units of float32 more."""
    error, of_plain = rms(found.cpu().double() - truth), rms(plain - truth)
    assert error <= 2 * of_plain + 4 * FLOAT32 * rms(truth), (
        f"{what}: error {error:.2e}, of plain PyTorch {of_plain:.2e}"
    )


def assert_tokens_as_near(found, truth, plain):
    for name, want in truth._asdict().items():
        if want is not None:
            assert_as_near(getattr(found, name), want, getattr(plain, name), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, eta", [*((name, 0.0) for name in MODELS), ("gemma2", ETA)])
@pytest.mark.parametrize("device", DEVICES)
def test_measure(device, name, dtype, eta):
    """Order 0 and 1, in microbatches of several rollouts and of one, and the sums of the tokens' values."""
    found = case(name, device, dtype)
    truth, plain = by_plain_pytorch(name, device, dtype, 1, eta)
    for order, budget in ((0, LONGEST[device]), (1, 3 * LONGEST[device])):
        sums = measure(
            found.policy, found.batch, found.direction, eta=eta, order=order, token_budget=budget, keep_tokens=True
        )
        values = truth._fields[: 2 + 2 * order]
        assert_tokens_as_near(sums.tokens, truth._replace(**dict.fromkeys(set(truth._fields) - set(values))), plain)
        for column, expected in plain_columns(sums.tokens, found.batch.response_offsets).items():
            np.testing.assert_allclose(getattr(sums, column), expected, rtol=1e-12, atol=1e-12, err_msg=column)


@pytest.mark.parametrize("device", SLOW_ON_THE_CPU)
def test_second_order(device):
    found = case("gemma2", device, torch.float32)
    truth, plain = by_plain_pytorch("gemma2", device, torch.float32, 2)
    run = partial(measure, found.policy, found.batch, found.direction, order=2, keep_tokens=True)
    assert_tokens_as_near(run(second_order="nested").tokens, truth, plain)
    tokens = run().tokens  # differences: a few percent off at worst
    for name in ("d2logp", "d2entropy"):
        assert rms(getattr(tokens, name).double() - getattr(truth, name)) <= 5e-2 * rms(getattr(truth, name)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("device", SLOW_ON_THE_CPU)
def test_compiled_layers(device, name, dtype, monkeypatch):
    """By the compiler itself on a GPU; on the CPU, where it would take tens of seconds, the traced graphs run as they
    are."""
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", lambda graph, **_settings: graph)
    found = case(name, device, dtype)
    truth, plain = by_plain_pytorch(name, device, dtype, 1, 0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="policy: .* goes on uncompiled")
        policy = Policy(found.model, compile_layers=True)
        for _ in range(2):  # what the first pass makes the second uses
            sums = measure(policy, found.batch, found.direction, keep_tokens=True)
    assert_tokens_as_near(sums.tokens, truth, plain)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_no_microbatch_waits_for_the_device(device, name):
    """PyTorch raises where the host would wait. Of a pass on a CPU tests/model/test_packed_row.py counts the places."""
    found = case(name, device, torch.float32)
    policy, n_tokens = found.policy, found.batch.n_tokens

    def run():
        walked = walk(found.batch, TokenBudget(LONGEST[device], policy.device), score)
        return in_rollout_order(walked, n_tokens, None)

    def score(microbatch):
        return policy.score(microbatch.row, microbatch.temperature, tangent=True)

    with policy.ready(), moved_weights(policy, found.direction, ETA, tangent=True), torch.no_grad():
        compiled = run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(compiled.dlogp, again.dlogp)


@pytest.mark.parametrize("device", DEVICES)
def test_a_direction_may_live_anywhere(device):
    found = case("llama", device, torch.float32)
    there = Direction({name: v.to(device) for name, v in found.direction.tensors.items()})
    a, b = (measure(found.policy, found.batch, v).columns() for v in (found.direction, there))
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("device", DEVICES)
def test_sampling(device):
    """By the policy in float64, logp + entropy of what is drawn has mean 0; and the draw leaves no trace."""
    found = case("mistral", device, torch.float32)
    state = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    before = state()
    draw = partial(sample, found.policy, [[5, 6, 7], [8]], per_prompt=40, max_new_tokens=6, temperature=TEMPERATURE)
    batch = draw(seed=1)
    assert torch.equal(before, state())
    assert torch.equal(draw(seed=1).tokens, batch.tokens) and not torch.equal(draw(seed=2).tokens, batch.tokens)
    with one_at_a_time.own_precision(found.exact):
        sums = measure(Policy(found.exact), batch)
    balance = sums.logp + sums.entropy
    assert abs(balance.mean()) < 4 * balance.std() / len(batch) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("device", DEVICES)
def test_reverse_mode(device, name, dtype):
    """The gradient itself, a policy-gradient step, and each parameter's share in the slope."""
    found = case(name, device, dtype)
    batch, named = found.batch, dict(found.model.named_parameters())
    base = measure(found.policy, batch, found.direction, keep_tokens=True)
    of_slope = token_coefficients(base, estimator="causal", per="token")
    truth, plain = (one_at_a_time.gradient(model, batch, *of_slope) for model in (found.exact, found.model))
    got = gradient(found.policy, batch, list(named.values()), *of_slope)
    for parameter, g in zip(named, got, strict=True):
        assert_as_near(g, truth[parameter], plain[parameter], parameter)
    shares = parameter_attribution(found.policy, batch, found.direction, base)
    v = tangents_of(found.exact, Direction(tangents_of(found.model, found.direction)))
    of_truth, of_plain = (torch.stack([(g[n] * v[n]).sum() for n in named]) for g in (truth, plain))
    assert_as_near(torch.tensor([shares[n] for n in named]), of_truth, of_plain, "shares")
    advantage = np.repeat(batch.advantage, batch.response_lens) / batch.n_tokens
    of_loss = np.zeros(batch.n_tokens), advantage
    truth, plain = (one_at_a_time.gradient(model, batch, *of_loss) for model in (found.exact, found.model))
    step = policy_gradient_direction(found.policy, batch, step_size=1e-3, optimizer="sgd")
    for parameter, g in step.tensors.items():
        assert_as_near(g, truth[parameter], plain[parameter], parameter)


@pytest.mark.parametrize("device", DEVICES)
def test_probe(device):
    """Slopes, and the measurement at two η, from tables of the tokens' values; and a hundred-thousandth of the standard
    error more, for the error of a single number may be small by chance."""
    found = case("mistral", device, torch.float32)
    result = probe(found.policy, found.batch, found.direction, [-ETA, ETA])
    tables = []
    for which in range(2):
        tokens = [by_plain_pytorch("mistral", device, torch.float32, 1, eta)[which] for eta in (0.0, -ETA, ETA)]
        tables.append([sequence_sums(x, found.batch.response_offsets, group=found.batch.group) for x in tokens])

    def numbers(base, *moved):
        slopes = [slope(base, estimator=name).value for name in result.slopes]
        return np.array([*slopes, *(importance(base, at).delta for at in moved)])

    truth, plain = (numbers(*table) for table in tables)
    got = np.array([e.value for e in result.slopes.values()] + [c.sequence.measured.delta for c in result.changes])
    stderr = np.array([e.stderr for e in result.slopes.values()] + [c.sequence.measured.stderr for c in result.changes])
    assert (abs(got - truth) <= 2 * abs(plain - truth) + 1e-5 * stderr).all()
    assert result.curvature is not None and result.device
