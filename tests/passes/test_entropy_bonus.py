"""Entropy under control: its gradient, the bonus for a target, and what a bonus does."""

import numpy as np
import pytest
import torch
from models import InFloat64
from tiny import EVALUATION, STEP, UPDATE, Tiny

from dentropy import (
    Direction,
    Policy,
    PolicyLoss,
    bonus_audit,
    bonus_for,
    entropy_gradient,
    measure,
    policy_gradient_step,
    slope,
    step_with_bonus,
    update_attribution,
)
from dentropy.passes.reverse_mode import gradient


@pytest.fixture(scope="module")
def tiny():
    with InFloat64():
        return Tiny()


@pytest.fixture(scope="module")
def bonus(tiny):
    with InFloat64():
        return entropy_gradient(tiny.policy, UPDATE)


def adam(tiny):
    """The state of one that has taken steps, whose second moment hardly depends on the next gradient."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(list(tiny.named.items()), lr=STEP, betas=(0.8, 0.95), weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in tiny.named.items()}
    for _ in range(3):
        for p in tiny.named.values():
            p.grad = 0.3 * torch.randn_like(p)
        optimizer.step()
    with torch.no_grad():
        for name, p in tiny.named.items():
            p.copy_(before[name])
            p.grad = None
    return optimizer.state_dict()


def along(tiny, direction, **form):
    return slope(measure(tiny.policy, EVALUATION, direction), **form).value


def test_the_gradient_is_that_of_the_causal_measurement(tiny, bonus):
    with InFloat64():
        want = tiny.slope_gradient(UPDATE)
    assert bonus.tensors.keys() == want.keys() and bonus.step_size == 1.0
    for name, g in want.items():
        torch.testing.assert_close(bonus.tensors[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", [dict(estimator="exact"), dict(estimator="mixed", per="sequence")])
def test_its_product_with_a_direction_is_the_slope_along_it(tiny, form):
    with InFloat64():
        torch.manual_seed(1)
        v = {name: torch.randn_like(p) for name, p in tiny.named.items()}
        found = entropy_gradient(tiny.policy, EVALUATION, **form)
        want = along(tiny, Direction(v), **form)
    assert sum(float((found.tensors[n] * x).sum()) for n, x in v.items()) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("settings", [dict(optimizer="sgd"), dict(optimizer="adamw", max_grad_norm=0.01)])
def test_a_step_with_a_bonus_is_the_one_of_a_loss_that_has_it(tiny, settings):
    with InFloat64():
        zero, mean = np.zeros(UPDATE.n_tokens), np.full(UPDATE.n_tokens, 1 / UPDATE.n_tokens)
        usual = gradient(tiny.policy, UPDATE, list(tiny.named.values()), mean, zero)
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, **settings)
        found = step_with_bonus(step, Direction(dict(zip(tiny.named, usual, strict=True))), 0.2)
        loss = PolicyLoss(entropy_bonus=0.2)
        want = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, loss=loss, **settings)
    assert found.clip_factor == pytest.approx(want.clip_factor)
    for name, v in want.direction().tensors.items():
        torch.testing.assert_close(found.direction().tensors[name], v, rtol=1e-8, atol=1e-8)


def test_of_an_sgd_the_step_hits_the_target_on_these_rollouts(tiny, bonus):
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, optimizer="sgd")
        for target in (0.0, 1e-5):
            found = bonus_for(target, tiny.policy, EVALUATION, step, bonus)
            assert along(tiny, found.step.direction()) == pytest.approx(target / STEP, abs=1e-10)
            assert found.update.value == pytest.approx(along(tiny, step.direction()), rel=1e-12)
            low, high = found.coefficient.interval or (-np.inf, np.inf)
            assert low < found.coefficient.value < high


def test_an_adam_is_solved_again_with_the_second_moment_of_the_first_solution(tiny, bonus):
    with InFloat64():
        settings = dict(optimizer="adamw", optimizer_state=adam(tiny))
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, **settings)
        held = {n: step.parts(n).gain * g for n, g in bonus.tensors.items()}
        first = -along(tiny, step.direction()) / along(tiny, Direction(held))
        found = bonus_for(0.0, tiny.policy, EVALUATION, step, bonus)
        at_first = step_with_bonus(step, bonus, first).direction()
        second = found.coefficient.value
        assert found.update.value + first * found.bonus.value == pytest.approx(along(tiny, at_first), abs=1e-10)
        assert second != pytest.approx(first, rel=1e-3)
        missed = abs(along(tiny, at_first)), abs(along(tiny, found.step.direction()))
    assert missed[1] < 0.3 * missed[0]


def test_the_audit_finds_what_the_bonus_makes(tiny):
    with InFloat64():
        plain, more = (
            policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, optimizer="sgd", loss=PolicyLoss(entropy_bonus=c))
            for c in (0.0, 0.2)
        )
        sums = measure(tiny.policy, EVALUATION, more.direction(), keep_tokens=True)
        found = bonus_audit(tiny.policy, EVALUATION, more.direction(), plain.direction())
        shares = update_attribution(tiny.policy, EVALUATION, more, sums)
        nothing = bonus_audit(tiny.policy, EVALUATION, plain.direction(), plain.direction())
        noise = {n: v * (1 + 1e-7 * torch.randn_like(v)) for n, v in plain.direction().tensors.items()}
        rounded = bonus_audit(tiny.policy, EVALUATION, Direction(noise, STEP), plain.direction())
        head = {"lm_head.weight": plain.direction().tensors["lm_head.weight"]}
        part = bonus_audit(tiny.policy, EVALUATION, plain.direction(), Direction(head, STEP))
        rest = {n: v for n, v in plain.direction().tensors.items() if n not in head}
        assert part.bonus.value == pytest.approx(along(tiny, Direction(rest)), rel=1e-9)
        with pytest.raises(ValueError, match="without: step_size 1, expected 0.001"):
            bonus_audit(tiny.policy, EVALUATION, plain.direction(), Direction(head))
    assert found.bonus.value == pytest.approx(shares.entropy_bonus, rel=1e-9)
    assert found.whole.value == slope(sums).value and found.verdict.startswith("the bonus raises entropy")
    assert nothing.bonus is None and nothing.verdict.startswith("the bonus does nothing: the update is the same")
    assert 0 < rounded.relative_size < 1e-6 and "which is rounding" in rounded.verdict


def test_bad_requests_are_refused(tiny, bonus):
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, optimizer="sgd")
        with pytest.raises(ValueError, match="update: a step of another policy"):
            bonus_for(0.0, Policy(tiny.model), EVALUATION, step, bonus)
        with pytest.raises(ValueError, match="bonus: other is no parameter that the step moves"):
            bonus_for(0.0, tiny.policy, EVALUATION, step, Direction({"other": torch.ones(2)}))
        with pytest.raises(ValueError, match="target: inf"):
            bonus_for(float("inf"), tiny.policy, EVALUATION, step, bonus)
