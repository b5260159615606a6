import copy

import numpy as np
import pytest
import torch
from models import InFloat64, random_batch, random_direction, random_model
from scipy.special import stdtrit

from dentropy import Direction, PackedBatch, Policy, curvature, importance, measure, noise_floor, slope
from dentropy.passes import noise_floor as module
from dentropy.passes.policy_gradient import policy_gradient_direction

DTYPES = (torch.float32, torch.bfloat16)
BENCHMARKED = dict(
    vocab_size=49152,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=2048,
)
SMALL = dict(
    vocab_size=4096,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    initializer_range=0.1,
)


def measured_with_floor(policy, batch, direction, eta, base=None, weights="sequence"):
    """(ΔH, its noise floor), both at `eta`."""
    base = measure(policy, batch, direction) if base is None else base
    moved = measure(policy, batch, direction, eta=eta, keep_tokens=weights == "prefix")
    measured, first = importance(base, moved, weights=weights), slope(base, estimator=module.DERIVATIVE[weights])
    return measured.delta, noise_floor(policy, batch, direction, base, measured, first, eta)


def all_in_every_block(batch) -> np.ndarray:
    return np.tile(np.flatnonzero(batch.response_lens), (module.BLOCKS, 1))


def widened(model) -> Policy:
    """The policy of the very same weights in float64."""
    with InFloat64():
        return Policy(copy.deepcopy(model).double())


def in_float64(policy, batch, direction, etas, weights=("sequence",)) -> list[list[float]]:
    """ΔH of a policy in float64 with each of `weights` at each of `etas`, computed in float64 throughout."""
    wide = Direction({name: v.double() for name, v in direction.tensors.items()})
    with InFloat64():
        base = measure(policy, batch, keep_tokens=True)
        moved = [measure(policy, batch, wide, eta=eta, order=0, keep_tokens=True) for eta in etas]
    return [[importance(base, other, weights=w).delta for w in weights] for other in moved]


def errors_over_floors(policy, wide, batch, direction, etas) -> np.ndarray:
    """|ΔH − that of the policy in float64| over the floor of it, [etas, forms]."""
    base, moved, measured, first = everything_measured(policy, batch, direction, etas)
    floors = module.noise_floors(policy, batch, direction, base, moved, measured, first)
    truths = in_float64(wide, batch, direction, etas, module.DERIVATIVE)
    deltas = [[m.delta for m in measured[eta]] for eta in etas]
    return np.abs(np.subtract(deltas, truths)) / [floors[eta] for eta in etas]


def everything_measured(policy, batch, direction, etas):
    """What `noise_floors` takes: the base table, and by η those at each and the measurements; and the slopes."""
    base = measure(policy, batch, direction, keep_tokens=True)
    moved = {eta: measure(policy, batch, direction, eta=eta, order=0, keep_tokens=True) for eta in etas}
    measured = {eta: [importance(base, table, weights=w) for w in module.DERIVATIVE] for eta, table in moved.items()}
    return base, moved, measured, [slope(base, estimator=name) for name in module.DERIVATIVE.values()]


@pytest.mark.filterwarnings("ignore:policy. weights are torch.bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "models, directions, settings, sampled, within, fill",
    [
        (2, 3, dict(num_hidden_layers=1), False, 9, (0.12, 1.0)),
        pytest.param(18, 1, {}, False, 31, (0.2, 0.75), marks=pytest.mark.slow),
        pytest.param(18, 1, {}, True, 31, (0.05, 0.75), marks=pytest.mark.slow),
    ],
    ids=["quick", "all", "sample"],
)
def test_errors_against_float64_lie_within_it_and_fill_it(
    monkeypatch, dtype, models, directions, settings, sampled, within, fill
):
    """With all 30 rollouts in every block, and with two, whose floor is up to 3 times larger; at both η from one.

    What a machine rounds is a draw of its own. 95% are expected within; fewer than 31 of 36, or 9 of 12, come once in
    500 (binomial). Their root mean square is 1/2.3 for errors of exactly the size that the floor says.
    """
    if not sampled:
        monkeypatch.setattr(module, "sampled_rollouts", all_in_every_block)
    ratios = []
    for seed in range(models):
        model = random_model(("llama", "qwen2")[seed % 2], seed, **settings).to(dtype)
        policy, wide = Policy(model), widened(model)
        for other in range(seed, seed + 100 * directions, 100):
            batch, direction = random_batch(other, rollouts=30), random_direction(model, other)
            ratios.append(errors_over_floors(policy, wide, batch, direction, (1e-3, 1e-2)))
    for form in np.concatenate(ratios).T:
        assert np.sum(form < 1) >= within
        assert fill[0] < np.sqrt(np.mean(form**2)) < fill[1]


@pytest.mark.parametrize(
    "n, blocks, size, shared",
    [(4096, 8, 82, 0.003), (125, 8, 2, 0.1), (28, 8, 2, 0.1), (28, 8, 28, 0.1), (8, 3, 2, 0.1), (8, 3, 2, 1.0)]
    + [(3, 1, 2, 0.3), (2, 1, 1, 1.0), (1, 1, 1, 1.0)],
)
def test_it_holds_whatever_the_rollouts_share(n, blocks, size, shared):
    """Normal d_i with that correlation: within t σ lie 95% of sums over all, 92% at worst."""
    rng, within = np.random.default_rng(0), []
    for _ in range(2000):
        common, own = rng.normal(size=(blocks, 1)), rng.normal(size=(blocks, size))
        variance = module._variance(np.sqrt(shared) * common + np.sqrt(1 - shared) * own, n)
        error = rng.normal() * np.sqrt(n + n * (n - 1) * shared)
        within.append(abs(error) < module.T_QUANTILES[blocks - 1] * np.sqrt(variance))
    assert np.mean(within) > 0.92


def test_of_two_rollouts_one_stands_for_both():
    assert module._variance(np.array([[3.0]]), 2) == (3.0 + 3.0) ** 2


def test_quantiles_are_student_s():
    np.testing.assert_allclose(module.T_QUANTILES, stdtrit(range(1, module.BLOCKS + 1), 0.975), rtol=2e-4)


@pytest.mark.filterwarnings("ignore:policy. weights are torch.bfloat16")
def test_true_rounding_in_bfloat16_is_flagged():
    """A ΔH of 2e-5 that is measured as 2e-4 or so; and an update that no weight takes note of."""
    truths, deltas = [], []
    model = random_model("llama", num_hidden_layers=1).bfloat16()
    policy, wide = Policy(model), widened(model)
    for seed in range(4):
        batch, direction = random_batch(seed, rollouts=30), random_direction(model, seed)
        delta, floor = measured_with_floor(policy, batch, direction, 1e-4)
        assert abs(delta) < floor
        truths += in_float64(wide, batch, direction, [1e-4])[0]
        deltas.append(delta)
        gone, floor = measured_with_floor(policy, batch, direction, 1e-9)
        assert abs(gone) < floor
    assert np.linalg.norm(np.subtract(deltas, truths)) > 2 * np.linalg.norm(truths)


def test_what_rounding_takes_from_the_update_counts():
    """Every weight moves by less than half a unit, so ΔH is 0; its error is all of η R', for which they add up."""
    model = random_model("llama")
    batch, policy = random_batch(), Policy(model)
    for i in np.flatnonzero(batch.response_lens):
        logits = model(torch.tensor([batch.prompt(i) + batch.response(i)])).logits
        torch.distributions.Categorical(logits=logits).entropy().sum().backward()
    direction = Direction({name: p.grad.sign() * p.detach().abs() for name, p in model.named_parameters()})
    eta, base = 0.24 * torch.finfo(torch.float32).eps, measure(policy, batch, direction)
    _, of_the_rest = measured_with_floor(policy, batch, direction, 1e-3, base)
    delta, floor = measured_with_floor(policy, batch, direction, eta, base)
    error = abs(eta * slope(base, estimator="exact").value)
    assert delta == 0 and floor > 2 * error > 2 * of_the_rest


def by_small_steps(policy, batch, direction, base) -> float:
    """The floor as it was taken before: what ΔH at ±ε, ε two small steps, has beside its linear term."""
    weights = float(sum(p.detach().double().square().sum() for p in policy.model.parameters())) ** 0.5
    steps = [count * torch.finfo(policy.dtype).eps * weights / direction.norm() for count in (30, 60)]
    rest = []
    for step in steps:
        up, down = (importance(base, measure(policy, batch, direction, eta=eta)).delta for eta in (step, -step))
        rest.append((up - down) / 2 - step * slope(base, estimator="exact").value)
    return 2 * float(np.sqrt(2 * np.mean(np.square(rest))))


def of_norm_1(direction: Direction) -> Direction:
    return Direction({name: v / direction.norm() for name, v in direction.tensors.items()})


def qwen2(settings, length):
    """A random policy, four rollouts of `length` random tokens, and a policy gradient of norm 1."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(**settings, tie_word_embeddings=True, max_position_embeddings=512)
    policy = Policy(transformers.AutoModelForCausalLM.from_config(config).eval())
    tokens = torch.randint(config.vocab_size, (4, length), generator=torch.Generator().manual_seed(2))
    ids = [part.tolist() for part in tokens.split([length // 8, length - length // 8], 1)]
    batch = PackedBatch.from_lists(*ids, group=[0, 0, 1, 1], reward=np.random.default_rng(0).random(4))
    return policy, batch, of_norm_1(policy_gradient_direction(policy, batch, step_size=1.0, optimizer="sgd"))


@pytest.mark.parametrize(
    "settings, length", [(SMALL, 129), pytest.param(BENCHMARKED, 257, marks=pytest.mark.slow)], ids=["2M", "57M"]
)
def test_along_a_direction_of_norm_1_it_is_a_fiftieth_of_the_bending(settings, length, monkeypatch):
    """About a hundredth, of all four rollouts.

    Chance makes a factor of up to 1.8 between σ from eight roundings and the true one (99.9%).
    """
    monkeypatch.setattr(module, "sampled_rollouts", all_in_every_block)
    policy, batch, direction = qwen2(settings, length)
    base = measure(policy, batch, direction)
    _, floor = measured_with_floor(policy, batch, direction, 1e-3, base)
    assert 0 < floor < 0.02 * by_small_steps(policy, batch, direction, base)


def test_it_does_not_grow_with_the_curvature(monkeypatch):
    """Two directions of one norm over the same weights and rollouts: the rounding is the same.

    Chance makes a ratio of up to 3.5 between two σ from eight roundings each (F distribution, 99.9%).
    """
    monkeypatch.setattr(module, "sampled_rollouts", all_in_every_block)
    policy, batch, steep = qwen2(SMALL, 129)
    flat = of_norm_1(random_direction(policy.model))
    bends, floors = [], []
    for direction in (flat, steep):
        base = measure(policy, batch, direction, order=2)
        bends.append(abs(curvature(base).value))
        floors.append(measured_with_floor(policy, batch, direction, 1e-4, base)[1])
    assert bends[1] > 1000 * bends[0] and floors[1] < 3.5 * floors[0]


def test_in_float64_it_is_far_below_float32():
    model = random_model("llama")
    batch, direction = random_batch(), random_direction(model)
    _, single = measured_with_floor(Policy(model), batch, direction, 1e-3)
    wide = Direction({name: v.double() for name, v in direction.tensors.items()})
    with InFloat64():
        _, double = measured_with_floor(Policy(model.double()), batch, wide, 1e-3)
    assert 0 < double < 1e-5 * single


@pytest.mark.parametrize("weights", ["sequence", "prefix"])
def test_the_differences_sum_to_the_change_of_the_measurement(weights):
    """With all rollouts in a block, against the measurement made again at the other weights, in float64."""
    model = random_model("llama")
    batch = random_batch(rollouts=12)
    wide = {name: v.double() for name, v in random_direction(model).tensors.items()}
    with InFloat64():
        policy, direction = Policy(model.double()), Direction(wide)
        base, moved, other = (
            measure(policy, batch, direction, eta=eta, order=0, keep_tokens=True) for eta in (0.0, 0.02, 0.02 + 1e-7)
        )
    shuffled = base.take(np.random.default_rng(0).permutation(len(batch)))
    measured = importance(shuffled, moved, weights=weights)
    change = importance(base, other, weights=weights).delta - measured.delta
    summed = module._differences(shuffled, measured, [(np.arange(len(batch)), other)]).sum()
    assert summed == pytest.approx(change, rel=1e-5) and change != 0


def test_the_slope_has_to_be_the_derivative_of_the_measurement():
    model = random_model("llama")
    batch, direction, policy = random_batch(rollouts=12), random_direction(model), Policy(model)
    base, moved = (measure(policy, batch, direction, eta=eta, keep_tokens=True) for eta in (0.0, 1e-3))
    for weights, right, wrong in (("prefix", "causal", "exact"), ("sequence", "exact", "causal")):
        measured = importance(base, moved, weights=weights)
        assert noise_floor(policy, batch, direction, base, measured, slope(base, estimator=right), 1e-3) > 0
        with pytest.raises(ValueError, match=f"first: the {wrong} slope, expected the {right} one"):
            noise_floor(policy, batch, direction, base, measured, slope(base, estimator=wrong), 1e-3)


def test_a_sample_says_what_all_rollouts_say(monkeypatch):
    """Up to 5 times as much where they share nothing (240, blocks of 5), and twice as much or as little by chance."""
    model = random_model("llama")
    batch, direction, policy = random_batch(rollouts=240), random_direction(model), Policy(model)
    _, sampled = measured_with_floor(policy, batch, direction, 1e-3)
    monkeypatch.setattr(module, "sampled_rollouts", all_in_every_block)
    _, whole = measured_with_floor(policy, batch, direction, 1e-3)
    assert 1 / 2 < sampled / whole < 10


@pytest.mark.parametrize(
    "rollouts, blocks, size",
    [(1, 1, 1), (2, 1, 1), (3, 1, 2), (8, 3, 2), (16, 7, 2), (17, 8, 2), (64, 8, 2), (125, 8, 2), (500, 8, 10)],
)
def test_no_rollout_is_sampled_twice_and_one_is_left_out(rollouts, blocks, size):
    batch = PackedBatch.from_lists([[1]] * (rollouts + 1), [[]] + [[1]] * rollouts)
    found = module.sampled_rollouts(batch)
    assert found.shape == (blocks, size) and found.min() > 0 and len(set(found.ravel())) == found.size
    assert found.size < rollouts or rollouts == 1
    np.testing.assert_array_equal(found, module.sampled_rollouts(batch))


def test_what_a_change_of_the_weights_does_carries_to_another_eta():
    """In float64, against the tables of the changed weights there; to first order the two are one."""
    model = random_model("llama", num_hidden_layers=1)
    v, w = (random_direction(model, seed).tensors for seed in (1, 2))
    batch, rollouts = random_batch(rollouts=8), np.array([5, 2, 7])

    def table(eta, change, batch=batch):
        moved = Direction({name: eta * v[name].double() + change * w[name].double() for name in v})
        return measure(policy, batch, moved, eta=1.0, keep_tokens=True)

    with InFloat64():
        policy = Policy(model.double())
        start, end = table(0.001, 0.0), table(0.004, 0.0)
        other, expected = (table(eta, 1e-6, batch.take(rollouts)) for eta in (0.001, 0.004))
    carried, here = module._carried(other, start, end, rollouts), end.take(rollouts)
    for name in ("logp", "entropy"):
        for of in (lambda table: table, lambda table: table.tokens):
            found, right, before = (np.asarray(getattr(of(table), name)) for table in (carried, expected, here))
            assert np.abs(found - right).max() < 0.1 * np.abs(right - before).max()


@pytest.mark.slow
def test_those_of_other_eta_are_as_large_as_if_scored_there(monkeypatch):
    """From the other roundings at the smallest η; at the largest an effective 40% of the rollouts or so are left.

    The logarithm of a ratio of two σ from eight roundings each has a standard deviation of 0.36 by chance alone (F
    distribution), a mean over four such one of 0.18, and 0.54 is three of them.
    """
    monkeypatch.setattr(module, "sampled_rollouts", all_in_every_block)
    ratios = []
    for seed in range(4):
        model = random_model(("llama", "qwen2")[seed % 2], seed, num_hidden_layers=1)
        batch, direction, policy = random_batch(seed, rollouts=16), random_direction(model, seed), Policy(model)
        base, moved, measured, first = everything_measured(policy, batch, direction, (0.1, -1e-3))
        together, alone = (
            module.noise_floors(policy, batch, direction, base, tables, measured, first)
            for tables in (moved, {0.1: moved[0.1]})
        )
        ratios.append(np.divide(together[0.1], alone[0.1]))
    assert np.abs(np.log(ratios).mean(0)).max() < 0.54


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_another_rounding_is_one_unit_off_in_one_value_of_six(dtype):
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:3000] = torch.tensor([1.0, -0.25, 0.0]).to(dtype).repeat(1000)
    other = module._one_in_six_a_unit_off(values, torch.Generator().manual_seed(1))
    up, down = (torch.nextafter(values, torch.full_like(values, end)) for end in (float("inf"), float("-inf")))
    assert ((other == values) | (other == up) | (other == down)).all()
    for side in (up, down):
        assert float((other == side)[3000:].double().mean()) == pytest.approx(1 / 12, rel=0.05)


def test_it_is_the_same_again_and_leaves_everything_as_it_was(monkeypatch):
    model = random_model("qwen2")  # a tied head
    batch, direction, policy = random_batch(), random_direction(model), Policy(model)
    base = measure(policy, batch, direction)
    weights = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    places = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    states = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002

    def unchanged():
        now = dict(model.named_parameters(remove_duplicate=False))
        return {name: id(p) for name, p in now.items()} == places and all(
            torch.equal(p, weights[name]) for name, p in now.items()
        )

    floors = [measured_with_floor(policy, batch, direction, 1e-3, base)[1] for _ in range(2)]
    assert floors[0] == floors[1] and unchanged()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]  # noqa: NPY002

    calls, hidden = [], policy.hidden

    def fails_at_the_third(*inputs):
        calls.append(not torch.equal(policy.head().weight, weights["lm_head.weight"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hidden(*inputs)

    moved = measure(policy, batch, direction, eta=1e-3)
    monkeypatch.setattr(policy, "hidden", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        noise_floor(policy, batch, direction, base, importance(base, moved), slope(base, estimator="exact"), 1e-3)
    assert calls == [True] * 3 and unchanged()
