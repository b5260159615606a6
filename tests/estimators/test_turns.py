"""Two turns with an environment between them, enumerated: what it says depends on θ only through what was generated.

The policy is a small transformer of three tokens. A turn ends with the end token or after two tokens; the environment
answers one way or another, with probabilities of its own that depend on the first turn, in texts of different lengths,
or ends the episode. All trajectories are packed rows; each counts as often as it occurs.
"""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from models import InFloat64, random_direction, random_model
from oracles import repeat_rows
from tables import estimator_all, per_both
from torch.func import functional_call, jvp

from dentropy import PackedBatch, Policy, measure
from dentropy.estimators import curvature, importance, slope

END, VOCAB, LONGEST, START = 0, 3, 2, 1
OFTEN = 200_000  # rollouts: how many there are of each trajectory is rounded to an integer
ETA = 0.1


def turns() -> list[tuple[int, ...]]:
    """Everything that can be said in a turn."""
    said = range(1, VOCAB)
    ended = [(*before, END) for n in range(LONGEST) for before in itertools.product(said, repeat=n)]
    return ended + list(itertools.product(said, repeat=LONGEST))


def replies(first: tuple[int, ...]) -> list[tuple[float, tuple[int, ...]]]:
    """(probability, text) of the environment's answers; () ends the episode."""
    if first == (END,):
        return [(1.0, ())]
    p = 0.2 + 0.5 * (sum(first) % 3) / 2
    return [(p, (first[0],)), (1 - p, (2, 1))]


@cache
def trajectories():
    """Tokens, masks and the environment's part of the probability of all there are."""
    found = []
    for first in turns():
        for p, reply in replies(first):
            for second in turns() if reply else [()]:
                tokens = (START, *first, *reply, *second)
                mask = [0] + [1] * len(first) + [0] * len(reply) + [1] * len(second)
                found.append((tokens, mask, p))
    return list(zip(*found, strict=True))


@cache
def policy_and_direction():
    model = random_model("llama", vocab_size=VOCAB, num_hidden_layers=1, hidden_size=16, intermediate_size=16).double()
    with InFloat64():
        return Policy(model), random_direction(model)


@cache
def tables():
    """The rows of all trajectories at θ, and at θ + ETA·v, by the pass; and how often each occurs."""
    policy, direction = policy_and_direction()
    tokens, masks, environment = trajectories()
    batch = PackedBatch.from_rows(tokens, masks)
    with InFloat64():
        base = measure(policy, batch, direction, order=2, second_order="nested")
        moved = measure(policy, batch, direction, eta=ETA)
    often = np.diff(np.rint(OFTEN * np.cumsum(np.exp(base.logp) * environment)), prepend=0).astype(int)
    return repeat_rows(base, often), repeat_rows(moved, often)


@cache
def truth(per: str) -> tuple[float, ...]:
    """R, R' and R'' at θ, and R at θ + ETA·v, from the model's own logits for every trajectory, without packing."""
    policy, direction = policy_and_direction()
    weights = {name: p.detach() for name, p in policy.model.named_parameters()}
    tokens, masks, environment = trajectories()
    by_length = {n: [i for i, row in enumerate(tokens) if len(row) == n] for n in set(map(len, tokens))}

    def entropy_per(eta):
        moved = {name: p + eta * direction.tensors[name] for name, p in weights.items()}
        total, size, mass = 0.0, 0.0, 0.0
        for rows in by_length.values():
            ids, keep = (torch.tensor([column[i] for i in rows]) for column in (tokens, masks))
            logits = functional_call(policy.model, moved, (), dict(input_ids=ids, use_cache=False)).logits[:, :-1]
            logp, keep = torch.log_softmax(logits, -1), keep[:, 1:]
            entropy = (-(logp.exp() * logp).sum(-1) * keep).sum(-1)
            said = (logp.gather(-1, ids[:, 1:, None])[..., 0] * keep).sum(-1)
            probability = said.exp() * torch.tensor([environment[i] for i in rows], dtype=torch.float64)
            total, mass = total + (probability * entropy).sum(), mass + probability.sum()
            size = size + (probability * (keep.sum(-1) if per == "token" else 1.0)).sum()
        return total / size, mass

    one, zero = torch.ones(()).double(), torch.zeros(()).double()
    with InFloat64():
        policy.model.set_attn_implementation("eager")
        first = lambda eta: jvp(lambda at: entropy_per(at)[0], (eta,), (one,))  # noqa: E731
        (value, slope_), (_, curvature_) = jvp(first, (zero,), (one,))
        later, mass = entropy_per(ETA * one)
    assert abs(float(mass) - 1) < 1e-12  # nothing that can happen is left out
    return tuple(map(float, (value, slope_, curvature_, later)))


def rounding(found) -> float:
    """Four standard deviations of what the rounded numbers of rollouts cost: each is off by the difference of two
    uniform errors, of variance 1/6, and a rollout more or less changes the value by its influence."""
    return 4 * np.sqrt(np.sum(np.unique(found.influence) ** 2) / 6)


@per_both
@estimator_all
def test_slopes_are_those_of_the_enumerated_entropy(estimator, per):
    base, _ = tables()
    found = slope(base, estimator=estimator, per=per)
    assert found.value == pytest.approx(truth(per)[1], abs=rounding(found))
    if per == "token":
        assert abs(found.parts["uncorrected"] - truth(per)[1]) > 20 * rounding(found)


@per_both
@pytest.mark.parametrize("estimator", ["exact", "causal"])
def test_curvatures_are_those_of_the_enumerated_entropy(estimator, per):
    base, _ = tables()
    found = curvature(base, estimator=estimator, per=per)
    assert found.value == pytest.approx(truth(per)[2], abs=rounding(found))
    assert abs(found.value) > 20 * rounding(found)


@per_both
def test_the_measured_change_is_that_of_the_enumerated_entropy(per):
    base, moved = tables()
    value, _, _, later = truth(per)
    found = importance(base, moved, per=per)
    assert found.base_value == pytest.approx(value, rel=1e-4)
    assert found.delta == pytest.approx(later - value, abs=rounding(found))
    assert abs(found.delta) > 20 * rounding(found)
