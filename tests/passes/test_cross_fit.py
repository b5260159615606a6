"""Each fold of an update's own rollouts against a step really made from the others."""

import dataclasses

import numpy as np
import pytest
from models import InFloat64
from tiny import STEP, UPDATE, Tiny

from dentropy import PackedBatch, PolicyLoss, cross_fitted, measure, policy_gradient_step, slope
from dentropy.passes.policy_loss import token_advantages
from dentropy.passes.slope_gradient import prompt_parts

MASK = np.random.default_rng(5).random(UPDATE.n_tokens) < 0.4
COLUMNS = ("n_tokens", "entropy", "dlogp", "dentropy", "entropy_to_go", "length_to_go")


@pytest.fixture(scope="module")
def tiny():
    with InFloat64():
        return Tiny()


@pytest.mark.parametrize(
    "settings",
    [
        dict(optimizer="sgd"),
        dict(loss=PolicyLoss(average="sequence", entropy_bonus=0.1), max_grad_norm=0.01),
        dict(loss=PolicyLoss(average="prompt"), optimizer="sgd"),
        dict(loss=PolicyLoss(average="length", max_length=7.0), optimizer="sgd"),
    ],
)
def test_each_fold_is_measured_along_the_step_of_the_others(tiny, settings):
    with InFloat64():
        counts = []
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, **settings)
        found = cross_fitted(step, folds=3, progress=counts.append)
        assert sum(counts) == 2 * UPDATE.n_tokens and found.rollout.tolist() == list(range(len(UPDATE)))
        np.testing.assert_array_equal(found.group, UPDATE.group)
        seen = []
        for rows, _ in prompt_parts(UPDATE, 3):
            others = np.setdiff1d(np.arange(len(UPDATE)), rows)
            assert not set(UPDATE.group[rows]) & set(UPDATE.group[others])
            apart = policy_gradient_step(tiny.policy, UPDATE.take(others), step_size=STEP, **settings)
            want = measure(tiny.policy, UPDATE.take(rows), apart.direction())
            for name in COLUMNS:
                np.testing.assert_allclose(getattr(found, name)[rows], getattr(want, name), rtol=1e-8, atol=1e-9)
            seen += rows.tolist()
    assert sorted(seen) == list(range(len(UPDATE)))


def test_a_part_of_the_tokens_is_measured_along_their_part(tiny):
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, optimizer="sgd")
        found = cross_fitted(step, mask=MASK)
        kept = dataclasses.replace(UPDATE, advantage=np.where(MASK, token_advantages(UPDATE), 0.0))
        alone = cross_fitted(policy_gradient_step(tiny.policy, kept, step_size=STEP, optimizer="sgd"))
    assert slope(found).value == pytest.approx(slope(alone).value, rel=1e-9)
    assert slope(found).stderr == pytest.approx(slope(alone).stderr, rel=1e-9)


def test_a_prompt_without_answers_and_one_without_advantages_are_in_the_table(tiny):
    prompts, answers = [[3]] * 2 + [[4]] * 2 + [[5]] * 2 + [[2]] * 2, [[4, 1], [5], [3, 3], [2], [3], [1, 2], [], []]
    batch = PackedBatch.from_lists(prompts, answers, group=[0, 0, 1, 1, 2, 2, 3, 3], reward=[1, 0, 0, 1, 1, 1, 0, 0])
    with InFloat64():
        step = policy_gradient_step(tiny.policy, batch, step_size=STEP, optimizer="sgd")
        found = cross_fitted(step)
    assert len(found) == 8 and np.isfinite(found.dlogp).all() and found.dlogp[4] != 0


def test_one_fold_is_refused(tiny):
    one = UPDATE.take([0, 1, 2])
    with InFloat64():
        step = policy_gradient_step(tiny.policy, one, step_size=STEP)
        for folds in (1, 8):
            with pytest.raises(ValueError, match=f"folds: {folds} of 1 prompts"):
                cross_fitted(step, folds=folds)
