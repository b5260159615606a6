"""Groups of the update's tokens: their shares, what is left without them, and the error bars of both."""

import dataclasses

import numpy as np
import pytest
import torch
from models import InFloat64
from oracles import TinyPolicy
from tiny import EVALUATION, STEP, UPDATE, Tiny

from dentropy import (
    Policy,
    PolicyLoss,
    measure,
    policy_gradient_step,
    slope,
    step_without,
    token_groups,
    update_attribution,
    update_groups,
)
from dentropy.estimators import difference
from dentropy.passes import update_groups as module

MASK = np.random.default_rng(5).random(UPDATE.n_tokens) < 0.4
FIRST = np.arange(UPDATE.n_tokens) < UPDATE.n_tokens // 2


@pytest.fixture(scope="module")
def tiny():
    with InFloat64():
        return Tiny()


def taken(tiny, **settings):
    """A step, its table on the evaluation's rollouts, and the shares of its tokens."""
    step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, **settings)
    sums = measure(tiny.policy, EVALUATION, step.direction(), keep_tokens=True)
    return step, sums, update_attribution(tiny.policy, EVALUATION, step, sums)


def momentum(tiny):
    optimizer = torch.optim.SGD(list(tiny.named.items()), lr=STEP, momentum=0.9, nesterov=True, weight_decay=0.1)
    for p in tiny.named.values():
        optimizer.state[p]["momentum_buffer"] = torch.full_like(p, 0.01)
    return optimizer.state_dict()


@pytest.mark.parametrize("kind", ["sgd", "momentum, bonus"])
def test_of_an_sgd_the_rest_is_the_slope_with_the_group_really_left_out(tiny, kind):
    with InFloat64():
        more = {} if kind == "sgd" else {"optimizer_state": momentum(tiny), "loss": PolicyLoss(entropy_bonus=0.2)}
        step, sums, shares = taken(tiny, optimizer="sgd", **more)
        found = update_groups(tiny.policy, EVALUATION, step, sums, {"some": MASK})["some"]
        left = step_without(step, MASK)
        kept = np.where(MASK, 0.0, shares.advantage)
        by_hand = dataclasses.replace(UPDATE, advantage=kept)
        anew = policy_gradient_step(tiny.policy, by_hand, step_size=STEP, optimizer="sgd", **more)
        really = slope(measure(tiny.policy, EVALUATION, anew.direction()))
    for name, v in left.direction().tensors.items():
        torch.testing.assert_close(v, anew.direction().tensors[name], rtol=1e-10, atol=1e-14)
    scale = abs(shares.share).sum()
    assert found.share.value == pytest.approx(shares.share[MASK].sum(), abs=1e-10 * scale)
    assert found.rest.value == pytest.approx(really.value, abs=1e-10 * scale)
    np.testing.assert_allclose(found.rest.influence, really.influence, rtol=1e-9, atol=1e-10 * scale)
    assert found.rest.stderr == pytest.approx(really.stderr, rel=1e-9)


def test_of_an_adam_the_share_is_at_the_step_as_taken_and_leaving_out_solves_it_anew(tiny):
    with InFloat64():
        step, sums, shares = taken(tiny, max_grad_norm=0.01)
        found = update_groups(tiny.policy, EVALUATION, step, sums, {"some": MASK})["some"]
        left = step_without(step, MASK)
        by_hand = dataclasses.replace(UPDATE, advantage=np.where(MASK, 0.0, shares.advantage))
        anew = policy_gradient_step(tiny.policy, by_hand, step_size=STEP, max_grad_norm=0.01)
        really = slope(measure(tiny.policy, EVALUATION, left.direction())).value
    assert step.clip_factor < 1 and left.clip_factor == pytest.approx(anew.clip_factor) != step.clip_factor
    for name, v in left.direction().tensors.items():
        torch.testing.assert_close(v, anew.direction().tensors[name], rtol=1e-9, atol=1e-9)
    scale = abs(shares.share).sum()
    assert found.share.value == pytest.approx(shares.share[MASK].sum(), abs=1e-9 * scale)
    assert abs(found.rest.value - really) > 1e-3 * scale


def test_a_complement_takes_no_pass_where_the_step_is_its_tokens_alone(tiny, monkeypatch):
    ran, real = [], measure
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: ran.append(1) or real(*args, **kwargs))
    with InFloat64():
        for settings, passes in (
            (dict(optimizer="sgd"), 1),
            (dict(optimizer="sgd", optimizer_state=momentum(tiny)), 2),
        ):
            step, sums, shares = taken(tiny, **settings)
            counts = []
            signs = token_groups(shares, ["positive advantage", "negative advantage"])
            ran.clear()
            found = update_groups(tiny.policy, EVALUATION, step, sums, signs, progress=counts.append)
            assert len(ran) == passes and sum(counts) == 2 * (UPDATE.n_tokens + EVALUATION.n_tokens)
            assert [group.is_complement for group in found.values()] == [False, passes == 1]
            for name, mask in signs.items():
                alone = update_groups(tiny.policy, EVALUATION, step, sums, {name: mask})[name]
                for part in ("share", "rest"):
                    one, other = getattr(alone, part), getattr(found[name], part)
                    assert one.value == pytest.approx(other.value, abs=1e-10)
                    assert one.stderr == pytest.approx(other.stderr, rel=1e-8)


def test_another_direction_leaves_what_the_tokens_do_not_explain_to_the_rest(tiny):
    with InFloat64():
        step, sums, _ = taken(tiny, optimizer="sgd")
        other = dataclasses.replace(step, gradient={n: 2 * g for n, g in step.gradient.items()}).direction()
        doubled = measure(tiny.policy, EVALUATION, other)
        masks = {"some": MASK, "others": ~MASK}
        own = update_groups(tiny.policy, EVALUATION, step, sums, masks)
        found = update_groups(tiny.policy, EVALUATION, step, doubled, masks, direction=other)
    for name, group in found.items():
        assert group.share.value == pytest.approx(own[name].share.value, rel=1e-9) and not group.is_complement
        assert group.rest.value == pytest.approx(2 * slope(sums).value - group.share.value, rel=1e-9)


def test_groups_by_name(tiny):
    with InFloat64():
        _, _, shares = taken(tiny)
        found = token_groups(dataclasses.replace(shares, weight=np.where(shares.advantage > 0, 0.0, shares.weight)))
        masks = token_groups(shares)
    assert "positive advantage" not in found and "negative advantage" in found
    np.testing.assert_array_equal(masks["positive advantage"], shares.advantage > 0)
    order = np.argsort(shares.entropy)
    fifth = len(order) // 5
    assert masks["low entropy"][order[:fifth]].all() and not masks["low entropy"][order[fifth + 1 :]].any()
    assert masks["high entropy"][order[1 - fifth :]].all() and not masks["high entropy"][order[: -fifth - 1]].any()
    responses = map(UPDATE.response, range(len(UPDATE)))
    first = [token == 1 and 1 not in response[:k] for response in responses for k, token in enumerate(response)]
    assert masks["end token"].tolist() == first and (shares.token[masks["end token"]] == 1).all()
    assert masks["end token"].sum() < shares.end.sum()


def test_bad_groups_are_refused(tiny):
    with InFloat64():
        step, sums, shares = taken(tiny)
    run = (tiny.policy, EVALUATION, step, sums)
    for mask, said in [
        (MASK[1:], "some: bool of shape"),
        (MASK.astype(int), "some: int64 of shape"),
        (np.zeros_like(MASK), "some: no token with a weight"),
    ]:
        with pytest.raises(ValueError, match=said):
            update_groups(*run, {"some": mask})
    with pytest.raises(ValueError, match="groups: 'odd', expected one of 'positive advantage'"):
        token_groups(shares, ["odd"])
    with pytest.raises(ValueError, match="mask: every token with a weight"):
        step_without(step, np.ones_like(MASK))
    with pytest.raises(ValueError, match="update: a step of another policy"):
        update_groups(Policy(tiny.model), EVALUATION, step, sums, {"some": MASK})


@pytest.mark.parametrize("n_batches", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_intervals_cover_the_enumerated_share_and_the_rest(n_batches):
    """An SGD step on tabular logits from 128 rollouts, judged on batches of 64: 16 prompts drawn at random, 4 each."""
    policy, rng = TinyPolicy(n_prompts=16), np.random.default_rng(7)
    prompts, drawn = (x[0] for x in policy.sample(rng, 1, n_groups=32))
    p = np.exp(policy.scale * policy.A)
    p /= p.sum(-1, keepdims=True)
    whole, group = np.zeros_like(policy.A), np.zeros_like(policy.A)
    for prompt, sequence in zip(prompts, drawn, strict=True):
        advantage = rng.normal()
        for k in range(policy.lengths[sequence]):
            at, token = policy.prefix[sequence, k], policy.tokens[sequence, k]
            term = advantage * policy.scale * (np.eye(policy.vocab)[token] - p[prompt, at]) / 128
            whole[prompt, at] += term
            if advantage > 0:
                group[prompt, at] += term
    columns, truths = [], []
    policy.C = np.zeros_like(policy.A)
    for policy.B in (whole, group):
        columns.append(policy.columns())
        truths.append(policy.truth()[1])
    truths = truths[1], truths[0] - truths[1]
    inside = []
    for batch in zip(*policy.sample(np.random.default_rng(8), n_batches), strict=True):
        total, share = (slope(policy.table(*batch, c)) for c in columns)
        ends = [estimate.interval() for estimate in (share, difference(total, share))]
        inside.append([low < truth < high for truth, (low, high) in zip(truths, ends, strict=True)])
    slack = 3 * (0.95 * 0.05 / n_batches) ** 0.5 if n_batches == 400 else 0.0
    for covered in np.mean(inside, 0):
        assert 0.93 - slack < covered < 0.97 + slack
