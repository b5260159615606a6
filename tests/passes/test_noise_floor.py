import numpy as np
from models import InFloat64, random_batch, random_direction, random_model

from dentropy import Direction, Policy, importance, measure
from dentropy.passes.noise_floor import noise_floor


def test_it_is_the_size_of_the_error_float32_makes():
    """Against the same measurement in float64, over ten policies: the floor is a fair two sigma of the error."""
    floors, errors = [], []
    for seed in range(10):
        model = random_model("llama", seed)
        batch, direction, eta = random_batch(seed, rollouts=12), random_direction(model, seed), 1e-4
        policy = Policy(model)
        base = measure(policy, batch, direction)
        floors.append(noise_floor(policy, batch, direction, base, token_budget=40))
        single = importance(base, measure(policy, batch, direction, eta=eta)).delta
        wide = Direction({name: v.double() for name, v in direction.tensors.items()})
        model.double()
        with InFloat64():
            policy = Policy(model)
            exact_base = measure(policy, batch, wide)
            exact = importance(exact_base, measure(policy, batch, wide, eta=eta)).delta
            double_floor = noise_floor(policy, batch, wide, exact_base, token_budget=40)
        errors.append(abs(single - exact))
        assert double_floor < 0.1 * abs(exact)
    sigma, typical = np.sqrt(np.mean(np.square(floors))) / 2, np.sqrt(np.mean(np.square(errors)))
    assert 1 / 3 < sigma / typical < 3  # two root mean squares of ten draws each


def test_in_float64_it_is_far_below_float32():
    model = random_model("llama")
    batch, direction = random_batch(), random_direction(model)
    policy = Policy(model)
    single = noise_floor(policy, batch, direction, measure(policy, batch, direction))
    wide = Direction({name: v.double() for name, v in direction.tensors.items()})
    with InFloat64():
        policy = Policy(model.double())
        double = noise_floor(policy, batch, wide, measure(policy, batch, wide))
    assert 0 < double < 1e-5 * single


def test_a_step_too_small_for_float32_is_below_it():
    for seed in range(5):
        model = random_model("llama", seed)
        batch, direction = random_batch(seed, rollouts=12), random_direction(model, seed)
        policy = Policy(model)
        base = measure(policy, batch, direction)
        floor = noise_floor(policy, batch, direction, base)
        for eta in (1e-12, -1e-11):
            assert abs(importance(base, measure(policy, batch, direction, eta=eta)).delta) < floor


def test_both_sides_are_packed_differently_even_where_all_fits_at_once(monkeypatch):
    model = random_model("llama")
    batch, direction, policy = random_batch(), random_direction(model), Policy(model)
    base, packings, hidden = measure(policy, batch, direction), [], policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda row: packings.append(len(row.bounds) - 1) or hidden(row))
    noise_floor(policy, batch, direction, base)
    together = int((batch.response_lens > 0).sum())
    assert packings.count(together) == 2 and sum(packings) == 4 * together
