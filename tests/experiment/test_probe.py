import copy
import dataclasses
from collections import Counter
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import InFloat64, random_direction, random_model

from dentropy import (
    Direction,
    PackedBatch,
    Policy,
    SequenceSums,
    importance,
    measure,
    moved_weights,
    noise_floor,
    probe,
    sample,
)
from dentropy.experiment.probe import FreshCheck, check_etas, fresh_check, tokens_to_run
from dentropy.experiment.summary import summary
from dentropy.rollouts.sampling import end_tokens

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
STEP = 0.01
ETAS = (-STEP, 0.5 * STEP, STEP, 2 * STEP)


@pytest.fixture(scope="module")
def policy():
    return Policy(random_model("llama"))


@pytest.fixture(scope="module")
def batch(policy):
    return sample(policy, PROMPTS, per_prompt=10, max_new_tokens=12)


@pytest.fixture(scope="module")
def direction(policy):
    return Direction(random_direction(policy.model).tensors, step_size=STEP)


@pytest.fixture(scope="module")
def result(policy, batch, direction):
    return probe(policy, batch, direction, ETAS)


def test_each_slope_is_the_derivative_of_its_measurement():
    with InFloat64():
        policy = Policy(random_model("llama").double())
        direction = random_direction(policy.model)
        batch = sample(policy, PROMPTS, per_prompt=4, max_new_tokens=8)
        found = probe(policy, batch, direction, [-1e-6, 1e-6])
    for name, forms in (("causal", found.changes), ("exact", [change.sequence for change in found.changes])):
        down, up = (form.measured.delta for form in forms)
        assert (up - down) / 2e-6 == pytest.approx(found.slopes[name].value, rel=1e-6)
        for eta, form in zip((-1e-6, 1e-6), forms, strict=True):
            assert form.linear.value == pytest.approx(eta * found.slopes[name].value)
    assert set(found.slopes) == {"causal", "exact", "mixed"}


def test_every_eta_is_measured_at_its_own_weights(policy, batch, direction, result):
    for eta, change in zip(ETAS, result.changes, strict=True):
        measured, moved = change.measured, change.moved
        with moved_weights(policy, direction, eta):
            by_hand = measure(policy, batch, keep_tokens=True)
        for weights, found in (("prefix", measured), ("sequence", change.sequence.measured)):
            assert found.delta == pytest.approx(importance(result.base, by_hand, weights=weights).delta, abs=1e-9)
        np.testing.assert_allclose(moved.entropy, by_hand.entropy, rtol=1e-6)
    assert result.etas == ETAS and result.step_size == STEP


def test_the_base_entropy_is_the_mean_over_tokens(policy, batch, result):
    tokens = measure(policy, batch, keep_tokens=True).tokens
    assert result.base_entropy == pytest.approx(tokens.entropy.double().mean().item(), rel=1e-6)
    assert 0 < result.base_stderr < result.base_entropy


def test_zero_among_the_etas_is_measured_as_nothing(policy, batch, direction):
    found = probe(policy, batch, direction, [0.0, STEP])
    at_zero, at_step = found.changes
    assert abs(at_zero.measured.delta) < 1e-5 < abs(at_step.measured.delta)
    assert at_zero.measured.ess_fraction == pytest.approx(1.0, abs=1e-6)
    assert not at_zero.below_noise and not at_step.below_noise


def test_a_change_below_the_noise_floor_is_no_measurement(policy, batch, direction):
    found = probe(policy, batch, direction, [1e-12, STEP], parameters=False)
    tiny, step = found.changes
    assert tiny.below_noise and tiny.diagnostics.verdict == "unusable" and "noise floor" in tiny.diagnostics.reason
    assert not step.below_noise
    written = found.content
    assert [entry["noise_floor"] for entry in written["measured"]] == [tiny.noise_floor, step.noise_floor]
    assert written["noise_floor"] == max(tiny.noise_floor, step.noise_floor) and tiny.noise_floor != step.noise_floor
    for form, name in ((tiny, "causal"), (tiny.sequence, "exact")):  # the others are carried over from the smallest
        again = noise_floor(policy, batch, direction, found.base, form.measured, found.slopes[name], tiny.eta)
        assert form.noise_floor == again


def test_the_sequence_weighted_measurement_has_a_noise_floor_of_its_own(policy, batch, direction):
    found = probe(policy, batch, direction, [1e-12, STEP], parameters=False)
    tiny, step = (change.sequence for change in found.changes)
    assert tiny.below_noise and tiny.diagnostics.verdict == "unusable" and "noise floor" in tiny.diagnostics.reason
    assert not step.below_noise and step.diagnostics.verdict != "unusable"
    assert tiny.noise_floor != found.changes[0].noise_floor
    for form, change in zip((tiny, step), found.content["measured"], strict=True):
        entry = change["sequence"]
        assert (entry["noise_floor"], entry["below_noise_floor"]) == (form.noise_floor, form.below_noise)
        assert (entry["verdict"], entry["verdict_reason"]) == (form.diagnostics.verdict, form.diagnostics.reason)


@pytest.mark.parametrize("parameters", [True, False])
def test_progress_counts_every_pass(policy, batch, direction, parameters):
    counts = []
    found = probe(policy, batch, direction, ETAS, token_budget=100, parameters=parameters, progress=counts.append)
    assert sum(counts) == tokens_to_run(policy, batch, ETAS, parameters) and len(counts) > 5 * 4
    assert (found.parameters is None) == (not parameters)


def test_curvature_predictions_and_shares_belong_to_the_slope(result):
    second = result.curvature
    assert (second.estimator, result.exact_curvature.estimator) == ("causal", "exact")
    for change in result.changes:
        for form, bent in ((change, second), (change.sequence, result.exact_curvature)):
            linear = change.eta * result.slopes[bent.estimator].value
            assert form.linear.value == pytest.approx(linear)
            assert form.quadratic.value == pytest.approx(linear + change.eta**2 / 2 * bent.value)
            assert form.error.value == pytest.approx(linear - form.measured.delta)
    assert result.trust.eta_star == pytest.approx(2 * abs(result.slopes["causal"].value / second.value))
    scale = sum(map(abs, result.parameters.values()))
    assert sum(result.parameters.values()) == pytest.approx(result.slopes["causal"].value, abs=1e-5 * scale)


def test_every_statistic_is_computed_once(policy, batch, direction, monkeypatch):
    calls = Counter()

    def counted(module, name):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            calls[f"{module.__name__.rpartition('.')[2]}.{name}"] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    for module, names in (
        ("experiment.probe", ("slope", "curvature", "importance", "prediction_error", "trust_range")),
        ("estimators.slopes", ("leave_one_out",)),
        ("estimators.curvatures", ("slope", "leave_one_out")),
        ("estimators.importance_sampling", ("leave_one_out",)),
    ):
        for name in names:
            counted(import_module(f"dentropy.{module}"), name)
    probe(policy, batch, direction, ETAS, parameters=False)
    n = len(ETAS)
    assert calls == {
        "probe.slope": 3,
        "probe.curvature": 2,
        "probe.trust_range": 1,
        "probe.importance": 2 * n,
        "probe.prediction_error": 2 * n,
        "slopes.leave_one_out": 3,
        "curvatures.leave_one_out": 2,
        "importance_sampling.leave_one_out": 2 * n + 2 * 8 * n,  # eight blocks of the noise floor
    }


def test_half_precision_has_no_curvature(batch):
    half = Policy(random_model("llama").to(torch.bfloat16))
    with pytest.warns(UserWarning, match="vanish"):
        found = probe(half, batch, random_direction(half.model), [STEP], parameters=False)
    assert found.curvature is None and found.trust is None and found.changes[0].quadratic is None
    assert "per unit of η²" not in found.summary() and "no curvature: weights in torch.bfloat16" in found.summary()


@pytest.mark.parametrize(
    "etas, message",
    [
        ([], "etas: expected at least one, got none"),
        ([0.0], "η = 0 only"),
        ([1e-6, float("nan")], "expected finite numbers, got nan"),
        ([float("inf")], "expected finite numbers, got inf"),
        ([1e-6, 2e-6, 1e-6], "1e-06 is given 2 times"),
    ],
)
def test_bad_etas_are_refused_before_any_work(etas, message):
    with pytest.raises(ValueError, match=message):
        check_etas(etas)
    with pytest.raises(ValueError, match=message):
        probe(None, None, None, etas)


def test_the_summary_shows_the_numbers(result):
    text = result.summary()
    assert f"{result.base_entropy:.4f} ± {result.base_stderr:.4f} nats per token" in text
    for estimate in result.slopes.values():
        assert f"{estimate.value: .3e} ± {estimate.stderr:.1e}" in text
    for eta, measured in ((change.eta, change.measured) for change in result.changes):
        line = next(line for line in text.splitlines() if line.split()[:1] == [f"{eta:.3g}"])
        assert f"{measured.delta: .3e} ± {measured.stderr:.1e}" in line and f"{measured.ess_fraction:.1%}" in line
        assert f"{eta * result.slopes['causal'].value: .3e}" in line
        assert f"{eta * result.slopes['mixed'].parts['uncorrected']: .3e}" in line


def test_one_group_has_no_standard_error_and_says_why(policy, direction):
    found = probe(policy, sample(policy, [[5, 6]], per_prompt=6, max_new_tokens=8), direction, [STEP])
    assert found.base_stderr is None and found.changes[0].measured.stderr is None
    assert "± ?" in found.summary() and "no standard error (?): all 6 rollouts are in one group" in found.summary()


def test_an_off_policy_batch_is_called_one(policy, batch, direction):
    flat = PackedBatch.from_lists([[5]] * 40, np.random.default_rng(0).integers(3, 40, (40, 12)).tolist())
    found = probe(policy, flat, direction, [STEP])
    assert any("logp + entropy" in warning for warning in found.audit.warnings)
    assert "Warnings\n  logp + entropy" in found.summary()


def test_rollouts_without_end_tokens_are_counted_and_named(policy, direction, result):
    short = sample(policy, [[5, 6], [7]], per_prompt=20, max_new_tokens=6)
    prompts, responses = [short.prompt(i) for i in range(40)], [short.response(i) for i in range(40)]
    cut = sum(ids[-1] not in end_tokens(policy) for ids in responses)
    found = probe(policy, short, direction, [STEP])
    assert 0 < cut < 40 and found.without_end == cut
    assert f"{cut} of 40 rollouts ({cut / 40:.1%}) stop without an end token" in found.summary()
    stripped = [ids[:-1] if ids[-1] in end_tokens(policy) and len(ids) > 1 else [9] for ids in responses]
    without = probe(policy, PackedBatch.from_lists(prompts, stripped), direction, [STEP])
    assert without.without_end == 40
    assert "no rollout ends with an end token of the policy" in without.summary()
    assert "stop without an end token" not in without.summary()


def test_the_summary_says_what_the_numbers_cannot_tell(result):
    content = copy.deepcopy(result.content)
    entry = content["measured"][-1]
    near, clear = "the weights are reliable: r; ΔH is not told apart from 0", "the weights are reliable: r"
    for line, changes in (
        (near, {"interval": None, "stderr": 0.6}),
        (clear, {"interval": None, "stderr": 0.4}),
        (near, {"interval": [-0.3, 2.3], "stderr": 0.4}),
        (clear, {"interval": [0.1, 1.9], "stderr": 0.6}),
        ("unusable: r", {"interval": [0.1, 1.9], "verdict": "unusable", "below_noise_floor": True}),
    ):
        said = {"delta": 1.0, "verdict": "reliable", "verdict_reason": "r", "below_noise_floor": False}
        text = summary(content | {"measured": [entry | said | changes]})
        assert f"{entry['eta']: .3g}  {line}\n" in text
    apart = {"verdict": "strained", "prediction_error": -2.5, "prediction_error_stderr": 1.0}
    sentence = f"of their paired difference, at η = {entry['eta']:.3g} (2.5)\n"
    assert sentence in summary(content | {"measured": [entry | apart]})
    for changes in ({"prediction_error": 1.9}, {"verdict": "unusable"}, {"prediction_error_stderr": None}):
        assert "paired difference" not in summary(content | {"measured": [entry | apart | changes]})


def test_the_summary_says_where_the_two_forms_part(result):
    content = copy.deepcopy(result.content)
    entry, curvature = content["measured"][-1], content["curvature"]
    apart = {"difference": 2.5, "difference_stderr": 1.0, "verdict": "strained"}
    sentence = "prefix and with sequence weights differ, by more than 2 standard errors of their paired difference, "
    sentence += f"at η = {entry['eta']:.3g} (2.5)\n"
    assert "importance sampling, prefix weights\n" in summary(content)
    for changes, said in (({}, True), ({"difference": 1.9}, False), ({"verdict": "unusable"}, False)):
        one = entry | {"verdict": "reliable", "sequence": entry["sequence"] | apart | changes}
        assert (sentence in summary(content | {"measured": [one]})) == said
    for difference in (2.5, -2.5, 1.9):
        exact = curvature["exact"] | {"difference": difference, "difference_stderr": 1.0}
        text = summary(content | {"curvature": curvature | {"exact": exact}})
        assert ("the exact curvature differ by 2.5 standard errors" in text) == (abs(difference) > 2)


class TestFreshCheck:
    def test_it_agrees_with_the_measurement_and_knows_its_error(self, policy, batch, direction, result):
        eta = ETAS[-1]
        with moved_weights(policy, direction, eta):
            drawn = sample(policy, PROMPTS, per_prompt=200, max_new_tokens=12, seed=5)
            fresh = measure(policy, drawn)
        check = fresh_check(result, eta, fresh)
        assert isinstance(check, FreshCheck) and check.n_sequences == 800 and check.n_tokens == drawn.n_tokens
        assert check.value == pytest.approx(fresh.entropy.sum() / fresh.n_tokens.sum())
        assert check.delta == pytest.approx(check.value - result.base_entropy)
        assert check.difference == pytest.approx(check.delta - result.changes[-1].measured.delta)
        assert abs(check.difference) < 4 * check.difference_stderr

    @pytest.mark.parametrize("prompts", ["random", "fixed"])
    def test_standard_errors_against_simulation(self, prompts):
        """Prompts have entropies of their own: random ones are paired by prompt, fixed ones add nothing. Both
        standard errors match the spread over many made-up experiments."""
        rng = np.random.default_rng(0)
        checks = [fresh_check(*made_up(rng, prompts)) for _ in range(400)]
        for name, error in (("delta", "stderr"), ("difference", "difference_stderr")):
            spread = np.std([getattr(check, name) for check in checks])
            claimed = np.mean([getattr(check, error) ** 2 for check in checks]) ** 0.5
            assert claimed == pytest.approx(spread, rel=0.15)

    @pytest.mark.parametrize("prompts", ["random", "fixed"])
    def test_standard_errors_by_differentiation(self, prompts):
        """ψ is the derivative with respect to a rollout's weight: of R_fresh − H̄ for the fresh ΔH, of R_fresh − R_moved
        for the difference, where R_moved weighs the base rollouts."""
        result, eta, fresh = made_up(np.random.default_rng(1), prompts)
        base, moved, check = result.base, result.changes[0].moved, fresh_check(result, eta, fresh)
        w = np.exp(moved.logp - base.logp)
        assert check.difference == pytest.approx(ratio(fresh) - ratio(moved, w), rel=1e-9)
        of_fresh = influence(fresh)
        for stderr, of_base in ((check.stderr, influence(base)), (check.difference_stderr, influence(moved, w))):
            variance = 0.0
            for group in range(40):
                mine, its = of_fresh[fresh.group == group], of_base[base.group == group]
                if prompts == "random":
                    variance += 40 / 39 * (mine.sum() - its.sum()) ** 2
                else:
                    variance += 4 * 4 * (mine.var(ddof=1) + its.var(ddof=1)) / 4
            assert stderr == pytest.approx(variance**0.5, rel=1e-6)

    def test_an_eta_that_was_not_measured(self, result):
        with pytest.raises(ValueError, match="eta: 0.5 was not measured"):
            fresh_check(result, 0.5, result.base)

    def test_other_prompts(self, result):
        other = dataclasses.replace(result.base, group=result.base.group + 1)
        with pytest.raises(ValueError, match="its groups differ"):
            fresh_check(result, ETAS[0], other)


def ratio(sums, weights=1.0):
    """Σ w H / Σ w T."""
    return (weights * sums.entropy).sum() / (weights * sums.n_tokens).sum()


def influence(sums, weights=1.0, step=1e-4):
    """The derivative of `ratio` with respect to the weight of each row, by central differences."""
    moves = step * np.eye(len(sums))
    return np.array([ratio(sums, weights * (1 + m)) - ratio(sums, weights * (1 - m)) for m in moves]) / (2 * step)


def made_up(rng, prompts):
    """(result, eta, fresh) of 40 prompts with effects of their own, 4 rollouts each; nothing is moved."""
    effect = rng.normal(size=40) if prompts == "random" else np.linspace(-1, 1, 40)
    group = np.repeat(np.arange(40), 4)

    def draw():
        n_tokens = rng.integers(2, 9, 160).astype(float)
        return n_tokens, n_tokens * (2 + effect[group]) + rng.normal(size=160)

    def table(n_tokens, entropy, logp):
        return SequenceSums(n_tokens=n_tokens, entropy=entropy, logp=logp, group=group, rollout=np.arange(160))

    n_tokens, entropy = draw()
    base = table(n_tokens, entropy, np.zeros(160))
    moved = table(n_tokens, entropy, 0.1 * rng.normal(size=160))
    change = SimpleNamespace(moved=moved, measured=importance(base, moved, prompts=prompts))
    result = SimpleNamespace(
        base=base, base_entropy=entropy.sum() / n_tokens.sum(), etas=(1.0,), changes=(change,), prompts=prompts
    )
    return result, 1.0, table(*draw(), np.zeros(160))


def test_the_global_random_state_is_not_touched(policy, batch, direction):
    before = torch.get_rng_state()
    probe(policy, batch, direction, [STEP])
    assert torch.equal(torch.get_rng_state(), before)
