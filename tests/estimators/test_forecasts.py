"""The forecast against exact enumeration: every estimate that is called unbiased is so over all that can be drawn."""

import dataclasses
import itertools

import numpy as np
import pytest
from gains import Gains, batches, table
from oracles import TinyPolicy, take
from scipy.special import stdtrit
from tables import prompts_both

from dentropy import forecast
from dentropy.estimators import Estimate, exchange_rate, importance, slope

GAINS = Gains(TinyPolicy())
ETA = 0.3
PER_GROUP = 8
KS = (1, 2, 4)
NAMES = ("length", "reward", "score", "pass@1", "pass@2", "pass@3")


def batch(**settings):
    return batches(GAINS, **{"etas": (ETA,), "per_group": PER_GROUP} | settings)


def one(**settings):
    base, moved, right, score = next(batch(**settings))
    return forecast(base, moved, right, {"score": score}, pass_at_k=KS)


def changes(found):
    """Every change of a mean by name."""
    named = {"length": found.length, "reward": found.reward, "score": found.values["score"]}
    return named | {f"pass@{k}": change for k, change in found.pass_at_k.items()}


class TestAllThatCanBeDrawn:
    """All 7³ answers to each of 2 prompts in groups of three, each weighted by its probability."""

    policy = TinyPolicy(vocab=3, horizon=2, n_prompts=2, seed=3)
    gains = Gains(policy, often=2)
    eta = 0.7

    @pytest.fixture(scope="class")
    @classmethod
    def drawn(cls):
        outcomes = [(p, s) for p in range(2) for s in itertools.product(range(7), repeat=3)]
        prompt = np.repeat([p for p, _ in outcomes], 3)
        sequence = np.concatenate([s for _, s in outcomes])
        moved = {cls.eta: table(cls.gains, prompt, sequence, cls.eta, 3)}
        base = table(cls.gains, prompt, sequence, per_group=3)
        rows = prompt, sequence
        found = forecast(base, moved, cls.gains.right[rows], {"score": cls.gains.score[rows]}, pass_at_k=[1, 2, 3])
        chance = cls.gains.probability(0.0)[0][rows].reshape(-1, 3).prod(1)
        return found, chance / 2

    @staticmethod
    def expected(statistic, chance):
        """The expectation of a group's own value, from the influence values."""
        own = statistic.value + chance.size * statistic.influence.reshape(-1, 3).sum(1)
        return own @ chance

    def at(self, name, eta, order=0):
        """The number, or its derivative, at eta."""
        if name.startswith("pass@"):
            return self.gains.pass_at(int(name[5:]), eta)[order]
        lengths = np.broadcast_to(self.policy.lengths, self.gains.right.shape)
        return self.gains.mean({"length": lengths, "reward": self.gains.right, "score": self.gains.score}[name], eta)[
            order
        ]

    def truth(self, name):
        """(now, slope, change)."""
        now = self.at(name, 0.0)
        return now, self.at(name, 0.0, 1), self.at(name, self.eta) - now

    @pytest.mark.parametrize("name", NAMES)
    def test_slopes_and_changes_have_no_bias(self, drawn, name):
        found, chance = drawn
        change = changes(found)[name]
        now, slope, moved = self.truth(name)
        assert self.expected(change.slope, chance) == pytest.approx(slope, abs=1e-12)
        assert self.expected(change.changes[self.eta], chance) == pytest.approx(moved, abs=1e-12)

    def test_the_divergence_has_none(self, drawn):
        found, chance = drawn
        measured = self.expected(found.kl.measured[self.eta], chance)
        assert measured == pytest.approx(self.gains.divergence(self.eta), abs=1e-12)

    def test_derivatives_are_those_of_the_enumerated_truth(self):
        h = 1e-5
        for name in NAMES:
            up, down = (self.at(name, eta) for eta in (h, -h))
            assert (up - down) / (2 * h) == pytest.approx(self.truth(name)[1], rel=1e-7), name

    def test_divergence_over_eta_squared_tends_to_half_of_fisher(self, drawn):
        found, chance = drawn
        fisher = self.expected(found.kl.fisher, chance)
        errors = [abs(self.gains.divergence(eta) / eta**2 - fisher / 2) for eta in (1e-2, 1e-3)]
        assert errors[1] < 0.11 * errors[0] and errors[1] < 1e-3 * fisher


def test_slopes_are_the_derivatives_of_the_changes_on_the_same_rollouts():
    h = 1e-4
    for prompts in ("random", "fixed"):
        base, moved, right, score = next(batch(prompts=prompts, etas=(h, -h)))
        found = forecast(base, moved, right, {"score": score}, pass_at_k=KS, prompts=prompts)
        for name, change in changes(found).items():
            difference = (change.changes[h].value - change.changes[-h].value) / (2 * h)
            assert difference == pytest.approx(change.slope.value, rel=1e-6, abs=1e-8), name
            influence = (change.changes[h].influence - change.changes[-h].influence) / (2 * h)
            np.testing.assert_allclose(influence, change.slope.influence, rtol=1e-5, atol=1e-8, err_msg=name)


def test_now_is_what_the_rollouts_say():
    base, moved, right, score = next(batch())
    found = one()
    assert found.reward.base == right.mean() and found.length.base == base.n_tokens.mean()
    assert found.values["score"].base == score.mean()
    for k in KS:
        # by all k-subsets of every prompt's answers
        groups = right.reshape(-1, PER_GROUP)
        hit = [np.mean([max(subset) for subset in itertools.combinations(row, k)]) for row in groups]
        assert found.pass_at_k[k].base == pytest.approx(np.mean(hit), rel=1e-12)


def test_the_entropy_is_that_of_the_estimators():
    base, moved, *_ = next(batch())
    found = forecast(base, moved)
    assert isinstance(found.entropy.slope, Estimate) and found.entropy.slope.value == slope(base).value
    assert found.entropy.changes[ETA].value == importance(base, moved[ETA], weights="prefix").value
    assert found.entropy.base == pytest.approx(base.entropy.sum() / base.n_tokens.sum())
    given = dataclasses.replace(found.entropy)
    assert forecast(base, moved, entropy=given).entropy is given


def test_what_was_not_asked_for_is_none():
    base, moved, *_ = next(batch())
    found = forecast(base, moved)
    assert found.reward is None and found.exchange_rate is None
    assert found.pass_at_k == found.values == found.exchange_rates == {}
    without = forecast(dataclasses.replace(base, fisher=None), {})
    assert without.kl.fisher is None and without.kl.forecast(0.1) is None and without.kl.measured == {}


@prompts_both
def test_a_constant_reward_buys_nothing(prompts):
    base, moved, right, _ = next(batch())
    found = forecast(base, moved, np.full(len(base), 3.0), prompts=prompts)
    assert found.reward.slope.value == found.reward.changes[ETA].value == 0
    shifted = forecast(base, moved, right + 5, prompts=prompts).reward
    plain = forecast(base, moved, right, prompts=prompts).reward
    assert shifted.slope.value == pytest.approx(plain.slope.value, rel=1e-12)
    assert shifted.changes[ETA].stderr == pytest.approx(plain.changes[ETA].stderr, rel=1e-12)


def test_the_order_of_the_moved_rows_does_not_matter():
    base, moved, right, score = next(batch())
    turned = {eta: take(sums, np.arange(len(sums))[::-1]) for eta, sums in moved.items()}
    found, same = (forecast(base, at, right, {"score": score}, pass_at_k=KS) for at in (turned, moved))
    for name, change in changes(found).items():
        assert change.changes[ETA].value == changes(same)[name].changes[ETA].value
    assert found.kl.measured[ETA].value == same.kl.measured[ETA].value


def test_a_prompt_with_one_rollout_takes_the_baseline_of_the_others():
    base, moved, right, _ = next(batch(per_group=1))
    found = forecast(base, moved, right)
    dlogp = np.array(base.dlogp)
    others = (right.sum() - right) / (right.size - 1)
    assert found.reward.slope.value == pytest.approx(np.mean((right - others) * dlogp), rel=1e-12)
    lengths = base.n_tokens.astype(int)
    terms, ends = [], np.concatenate([[0], np.cumsum(lengths)])
    for i, length in enumerate(lengths):
        for k in range(1, length + 1):
            rest = np.maximum(np.delete(lengths, i) - k, 0).mean()
            terms.append(base.tokens.dlogp[ends[i] + k - 1].item() * (length - k - rest))
    assert found.length.slope.value == pytest.approx(sum(terms) / len(lengths), rel=1e-12)


def test_the_length_forecast_is_its_definition():
    base, moved, *_ = next(batch(n_groups=3))
    lengths, total = base.n_tokens.astype(int), 0.0
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ratio = (moved[ETA].tokens.logp - base.tokens.logp).numpy()
    for i, length in enumerate(lengths):
        same = np.flatnonzero((base.group == base.group[i]) & (np.arange(len(base)) != i))
        for k in range(1, length + 1):
            before = np.exp(ratio[ends[i] : ends[i] + k - 1].sum())
            left = length - k - np.maximum(lengths[same] - k, 0).mean()
            total += before * np.expm1(ratio[ends[i] + k - 1]) * left
    assert forecast(base, moved).length.changes[ETA].value == pytest.approx(total / len(base), rel=1e-12)


def test_the_divergence_is_its_definition():
    base, moved, *_ = next(batch())
    found = forecast(base, moved).kl.measured[ETA]
    ratio = np.exp((moved[ETA].tokens.logp - base.tokens.logp).numpy())
    assert found.value == pytest.approx(np.sum(ratio - 1 - np.log(ratio)) / len(base), rel=1e-12)


@pytest.mark.parametrize("k", [2, 4])
def test_pass_at_k_with_fixed_prompts_leaves_out_one_rollout_of_a_prompt_at_a_time(k):
    base, moved, right, _ = next(batch())
    fixed, random = (forecast(base, moved, right, pass_at_k=[k], prompts=p).pass_at_k[k] for p in ("fixed", "random"))
    variance = 0.0
    for first in range(0, len(base), PER_GROUP):
        rows = np.arange(first, first + PER_GROUP)

        def change(rows):
            pair = {ETA: take(moved[ETA], rows)}
            return forecast(take(base, rows), pair, right[rows], pass_at_k=[k]).pass_at_k[k].changes[ETA].value

        without = np.array([change(np.delete(rows, i)) for i in range(PER_GROUP)])
        variance += (PER_GROUP - 1) * without.var()
    assert fixed.changes[ETA].value == pytest.approx(random.changes[ETA].value, rel=1e-12)
    assert fixed.changes[ETA].stderr == pytest.approx(variance**0.5 / 16, rel=1e-9)


def test_the_divergence_per_token_is_that_of_all_tokens():
    base, moved, *_ = next(batch())
    found = forecast(base, moved)
    each = found.kl.measured[ETA], found.kl_per_token.measured[ETA]
    assert each[0].value * len(base) == pytest.approx(each[1].value * base.n_tokens.sum(), rel=1e-12)
    assert found.kl_per_token.fisher.value == pytest.approx(base.fisher.sum() / base.n_tokens.sum(), rel=1e-12)
    predicted = found.kl.forecast(ETA)
    assert predicted.value == pytest.approx(ETA**2 / 2 * base.fisher.mean(), rel=1e-12)
    low, high = predicted.interval()
    ratio = np.exp(stdtrit(predicted.dof, 0.975) * predicted.stderr / predicted.value)
    assert 0 < low < predicted.value < high
    assert low * ratio == pytest.approx(predicted.value) == pytest.approx(high / ratio)
    still = forecast(base, {0.0: dataclasses.replace(base)}).kl.measured[0.0]
    assert still.value == 0 and still.interval() == (0, 0)


@prompts_both
def test_exchange_rates_are_those_not_told_apart_from_the_two_changes(prompts):
    base, moved, right, _ = next(batch(n_groups=16, prompts="fixed"))
    reward = right - 0.2 * base.n_tokens  # which the step moves for sure: it shortens the answers
    found = forecast(base, moved, reward, prompts=prompts)
    rate = found.exchange_rates[ETA]
    s, j = found.entropy.changes[ETA], found.reward.changes[ETA]
    groups, t = j.groups, stdtrit(min(s.dof, j.dof), 0.975)

    def excess(rho):
        return abs(s.value - rho * j.value) - t * groups.stderr(s.influence - rho * j.influence)[0]

    low, high = rate.interval
    assert rate.reason is None and low < rate.value < high
    assert rate.value == pytest.approx(s.value / j.value)
    for end, inward in ((low, 1), (high, -1)):
        step = inward * 1e-6 * (high - low)
        assert excess(end + step) < 0 < excess(end - step)
    assert excess(rate.value) < 0


def test_no_exchange_rate_without_a_change_of_reward_or_an_error():
    base, moved, _, score = next(batch())
    nothing = exchange_rate(slope(base), forecast(base, {}, np.ones(len(base))).reward.slope)
    assert nothing.value is None and nothing.interval is None
    assert nothing.reason == "the change of reward is not told apart from 0"
    alone = dataclasses.replace(base, group=np.zeros(len(base), int))
    found = forecast(alone, {}, score)
    assert found.reward.slope.stderr is None and "one group" in found.exchange_rate.reason


def test_few_prompts_in_which_pass_at_k_can_change_are_said():
    base, moved, right, _ = next(batch())
    easy = right.copy()
    easy[PER_GROUP:] = 1.0  # every other prompt is solved for sure
    found = forecast(base, moved, easy, pass_at_k=[2]).pass_at_k[2]
    assert any(w.startswith("pass@2 can change in") and "of 16 prompts" in w for w in found.slope.warnings)
    assert not any("pass@1" in w for w in forecast(base, moved, right, pass_at_k=[1]).pass_at_k[1].slope.warnings)


def test_bad_input():
    base, moved, right, score = next(batch())
    n = len(base)

    def refused(match, *args, **settings):
        with pytest.raises(ValueError, match=match):
            forecast(*args, **settings)

    refused(r"reward: 2 at row 0, expected 0 or 1 for pass@k", base, moved, np.full(n, 2.0), pass_at_k=[1])
    refused(r"reward: None, expected rewards of 0 or 1", base, moved, pass_at_k=[1])
    refused(r"pass_at_k: 9, but group 0 has 8 rollouts, expected 9", base, moved, right, pass_at_k=[9])
    refused(r"pass_at_k: 8, but group 0 .*'fixed'", base, moved, right, pass_at_k=[8], prompts="fixed")
    for k in (0, 1.5, True):
        refused("pass_at_k: .*, expected whole numbers", base, moved, right, pass_at_k=[k])
    refused(rf"reward: shape \({n - 1},\), expected \({n},\)", base, moved, right[1:])
    refused(r"values\['score'\]: nan at row 3", base, moved, values={"score": np.where(np.arange(n) == 3, np.nan, 0)})
    refused(r"values\['score'\]: dtype <U1, expected numbers", base, moved, values={"score": ["a"] * n})
    refused("tokens: None", dataclasses.replace(base, tokens=None), moved)
    refused("moved.tokens: None", base, {ETA: dataclasses.replace(moved[ETA], tokens=None)})
    refused("moved: a table at η = nan", base, {float("nan"): moved[ETA]})
    refused("rollout .* is missing", base, {ETA: take(moved[ETA], np.arange(1, n))})
    refused("prompts: 'some'", base, moved, prompts="some")
    entropy = forecast(base, {}).entropy
    refused("entropy: changes at η", base, moved, entropy=entropy)
    refused("entropy: prompts='random'", base, {}, entropy=entropy, prompts="fixed")
