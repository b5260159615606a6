"""What a probe runs, and that the second derivatives it gets from so little are good enough."""

from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from crosses import crossed
from models import InFloat64, random_direction, random_model

from dentropy import Direction, PackedBatch, Policy, curvature, importance, measure, probe, sample, slope
from dentropy.cli.probe import DEFAULT_STEPS
from dentropy.experiment.cost import cost, forward_passes
from dentropy.experiment.probe import tokens_to_run
from dentropy.passes import slope_gradient as reverse
from dentropy.passes.second_order import difference_step

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]] * 4
# η in units of the step that second differences take of their own, and which of them serves.
CASES = {
    "a pair": ([2.4 * step for step in DEFAULT_STEPS], 1.2),
    "pairs that bend": ([100 * step for step in DEFAULT_STEPS], None),
    "pairs that drown in rounding": ([0.01 * step for step in DEFAULT_STEPS], None),
    "one sign only": ([1.2, 1.3, -1.4, 2.5, 3.0], None),
}


class Setting:
    def __init__(self, dtype):
        self.policy = Policy(random_model("llama").to(dtype))
        self.batch = sample(self.policy, PROMPTS, per_prompt=4, max_new_tokens=16)
        drawn = random_direction(random_model("llama")).tensors
        self.direction = Direction({name: v.to(dtype) for name, v in drawn.items()})
        self.nested = measure(self.policy, self.batch, self.direction, order=2, second_order="nested", keep_tokens=True)
        self.own = difference_step(self.nested.tokens, dtype)

    def probe(self, etas, **settings):
        return probe(self.policy, self.batch, self.direction, [self.own * eta for eta in etas], **settings)


@pytest.fixture(scope="module")
def single():
    return Setting(torch.float32)


@pytest.fixture(scope="module")
def double():
    with InFloat64():
        return Setting(torch.float64)


@pytest.fixture
def passes(single, monkeypatch):
    """The passes over all rollouts that `single.policy` makes, by kind, and the tokens of the others."""
    found, score, gradient = Counter(), single.policy.score, reverse.gradient

    def scored(row, temperature, *, tangent):
        whole = len(row.targets) == single.batch.n_tokens
        found["tangent" if tangent else "forward" if whole else "noise_floor"] += 1 if whole else len(row.targets)
        return score(row, temperature, tangent=tangent)

    def differentiated(*args, **kwargs):
        found["reverse"] += 1
        return gradient(*args, **kwargs)

    monkeypatch.setattr(single.policy, "score", scored)
    monkeypatch.setattr(reverse, "gradient", differentiated)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("pairs")) for name in CASES]
)
def test_passes_are_as_few_as_said(single, passes, name):
    etas, serves = CASES[name]
    counts = []
    found = single.probe(etas, token_budget=10**6, progress=counts.append)
    assert passes["tangent"] == passes["reverse"] == 1
    assert passes["forward"] == (5 if serves else 7)
    tokens = 9 * single.batch.n_tokens + passes["noise_floor"]
    assert tokens_to_run(single.policy, single.batch, etas) == sum(counts) == tokens
    skipped = 2 * single.batch.n_tokens if serves else 0
    assert found.content["cost"] == {**passes, "tokens": tokens - skipped}
    assert found.base.second_order_step[0] == pytest.approx(single.own * (serves or 1), rel=1e-4)
    share = passes["noise_floor"] / single.batch.n_tokens
    said = f"this run: {7 if serves else 9} passes over the rollouts and {share:.0%} of one for the noise floors, "
    said += f"{tokens - skipped:,} tokens in all"
    about = (5 if serves else 7) + 3 + 3 + share
    assert said in found.summary() and f"about {about:.0f} plain forward passes" in found.summary()


@pytest.mark.parametrize("n", [2, 3, 8, 16, 31, 32, 64, 80, 1000])
def test_five_eta_without_a_pair_and_parameters_come_to_less_than_14_passes(n):
    lengths = np.random.default_rng(n).integers(1, 200, n)
    batch = PackedBatch.from_lists([[1]] * n, [[2] * length for length in lengths], group=np.arange(n) // 4)
    found = cost(batch, 5, 2, True)
    passes = forward_passes(found, batch.n_tokens)
    assert {k: passes[k] for k in ("forward", "tangent", "reverse")} == {"forward": 7, "tangent": 3, "reverse": 3}
    assert 13 < sum(passes.values()) < 14
    assert found["tokens"] == 9 * batch.n_tokens + found["noise_floor"]


@crossed(lambda name, dtype: dtype == "single" or name == "a pair", name=CASES, dtype=["single", "double"])
def test_the_curvature_is_the_nested_one_within_a_tenth_of_its_error(request, name, dtype):
    setting, (etas, _) = request.getfixturevalue(dtype), CASES[name]
    with InFloat64() if dtype == "double" else nullcontext():
        found = setting.probe(etas, parameters=False)
    for estimator in ("exact", "causal"):
        cheap, exact = (curvature(table, estimator=estimator) for table in (found.base, setting.nested))
        assert abs(cheap.value - exact.value) < 0.1 * exact.stderr
        assert cheap.stderr == pytest.approx(exact.stderr, rel=0.1)


def test_slopes_and_measurements_do_not_depend_on_it(single):
    etas, _ = CASES["a pair"]
    found = single.probe(etas, parameters=False)
    base = measure(single.policy, single.batch, single.direction)
    for name, estimate in found.slopes.items():
        assert estimate.value == slope(base, estimator=name).value
    for change in found.changes:
        moved = measure(single.policy, single.batch, single.direction, eta=change.eta)
        assert change.sequence.measured.delta == importance(base, moved).delta


def test_half_precision_pays_for_no_second_order():
    policy = Policy(random_model("llama").to(torch.bfloat16))
    batch = sample(policy, PROMPTS, per_prompt=2, max_new_tokens=8)
    with pytest.warns(UserWarning, match="vanish"):
        found = probe(policy, batch, random_direction(policy.model), [-0.01, 0.01], parameters=False)
    assert found.cost["forward"] == 2 and found.cost["tangent"] == 1 and found.cost["reverse"] == 0
    assert found.cost["tokens"] == tokens_to_run(policy, batch, [-0.01, 0.01], parameters=False)


def test_jumps_within_the_step_leave_no_curvature():
    policy = Policy(random_model("mixtral"))
    batch = sample(policy, PROMPTS, per_prompt=4, max_new_tokens=8)
    found = probe(policy, batch, random_direction(policy.model), [0.001], parameters=False)
    assert found.curvature is None and found.trust is None and found.base.d2logp is None
    assert "jump within the step" in found.no_curvature
    assert "no curvature: values bend or jump within the step" in found.summary()
