"""Rollouts of another sampler, against exact enumeration of the policy.

With every answer once, which a uniform sampler has drawn, an estimate is the truth to rounding. Coverage is of the
intervals that users get.
"""

import dataclasses

import numpy as np
import pytest
from samplers import ETA, FORMS, RIGHT, divergences, drawn_by, every_answer, mean_over_answers, statistics
from tables import ESTIMATORS, POLICY, one_batch, per_both, table_with_tokens

from dentropy.estimators import (
    base_weights,
    by_lag,
    by_length,
    by_position,
    curvature,
    forecast,
    importance,
    importance_diagnostics,
    on_policy_audit,
    slope,
    token_attribution,
)
from dentropy.stats.tables import SequenceSums


@per_both
class TestEveryAnswer:
    def test_entropy_and_slopes(self, per):
        sums, (before, first, _) = every_answer(), POLICY.truth(0.0, per)
        for estimator in ESTIMATORS:
            found = slope(sums, estimator=estimator, per=per)
            assert found.value == pytest.approx(first, rel=1e-11)
            assert found.contributions.sum() == pytest.approx(first, rel=1e-11)
        for weights in FORMS.values():
            assert importance(sums, sums, weights=weights, per=per).base_value == pytest.approx(before, rel=1e-12)

    def test_curvatures(self, per):
        for estimator in FORMS:
            found = curvature(every_answer(), estimator=estimator, per=per).value
            assert found == pytest.approx(POLICY.truth(0.0, per)[2], rel=1e-10)

    def test_measurements(self, per):
        before, after = POLICY.truth(0.0, per)[0], POLICY.truth(0.5, per)[0]
        for weights in FORMS.values():
            found = importance(every_answer(), every_answer(0.5), weights=weights, per=per)
            assert found.delta == pytest.approx(after - before, rel=1e-10)
            assert found.contributions.sum() == pytest.approx(after - before, rel=1e-10)
            assert found.mean_weight == pytest.approx(1, rel=1e-10)

    def test_attributions_add_up(self, per):
        sums, first = every_answer(), POLICY.truth(0.0, per)[1]
        for estimator in ESTIMATORS:
            assert token_attribution(sums, estimator=estimator, per=per).sum() == pytest.approx(first, rel=1e-10)
            assert by_position(sums, estimator=estimator, per=per).contribution.sum() == pytest.approx(first, rel=1e-10)
        for bins in (by_lag(sums, per=per), by_length(sums, per=per)):
            assert bins.contribution.sum() == pytest.approx(first, rel=1e-10)

    def test_the_parts_of_a_slope(self, per):
        sums, baseline = every_answer(), np.random.default_rng(0).standard_normal(len(every_answer().tokens.logp))
        uncorrected = POLICY.truth(0.0, "sequence")[1] / (1 if per == "sequence" else POLICY_LENGTH)
        for estimator in ESTIMATORS:
            for given in ("none", "entropy"):
                found = slope(sums, estimator=estimator, per=per, baseline=given).parts["uncorrected"]
                assert found == pytest.approx(uncorrected, rel=1e-9)
        same = every_answer().tokens.entropy.numpy()
        with_array = slope(sums, estimator="mixed", per=per, baseline=same).value
        assert with_array == pytest.approx(slope(sums, estimator="mixed", per=per).value, rel=1e-10)
        assert slope(sums, per=per, horizon=9).value == pytest.approx(slope(sums, per=per).value, rel=1e-12)
        assert slope(sums, per=per, baseline=baseline).value == slope(sums, per=per).value


POLICY_LENGTH = mean_over_answers(np.broadcast_to(POLICY.lengths, RIGHT.shape).astype(float))[0]


def test_the_forecast_of_every_answer():
    found = forecast(every_answer(), {0.5: every_answer(0.5)}, RIGHT.ravel().astype(float))
    lengths = np.broadcast_to(POLICY.lengths, RIGHT.shape).astype(float)
    assert found.entropy.base == pytest.approx(POLICY.truth()[0], rel=1e-12)
    assert found.entropy.slope.value == pytest.approx(POLICY.truth()[1], rel=1e-11)
    for change, values in ((found.reward, RIGHT.astype(float)), (found.length, lengths)):
        # the slopes have baselines from answers that are drawn independently: see the coverage
        assert change.base == pytest.approx(mean_over_answers(values)[0], rel=1e-12)
    divergence, fisher = divergences(0.5)
    assert found.kl.measured[0.5].value == pytest.approx(divergence, rel=1e-10)
    assert found.kl.fisher.value == pytest.approx(fisher, rel=1e-10)


@pytest.mark.parametrize(
    "n_groups, n_batches", [(16, 12), *(pytest.param(n, 1000, marks=pytest.mark.slow) for n in (16, 64))]
)
@pytest.mark.parametrize("name", ["hotter", "older"])
def test_bias_and_coverage(name, n_groups, n_batches):
    """Bias within a ratio bias of a tenth of a standard deviation and 4 errors of the mean; 93 to 97% coverage."""
    values, covered, truths = {}, {}, {}
    for (prompt, sequence), tables in drawn_by(name, n_batches, n_groups, etas=(0.0, ETA), seed=3):
        for what, estimate, truth in statistics(*tables, RIGHT[prompt, sequence].astype(float)):
            low, high = estimate.interval()
            values.setdefault(what, []).append(estimate.value)
            covered.setdefault(what, []).append(low < truth < high)
            truths[what] = truth
    slack = 3 * (0.95 * 0.05 / n_batches) ** 0.5
    missed = {}
    for what, truth in truths.items():
        value = np.array(values[what])
        deviation = value.std(ddof=1)
        off, hit = abs(value.mean() - truth), np.mean(covered[what])
        if off > 4 * deviation / n_batches**0.5 + 0.1 * deviation or not 0.93 - slack < hit < 0.97 + slack:
            missed[what] = round(off / deviation, 3), hit
    print({what: float(np.mean(hits)) for what, hits in covered.items()})
    assert not missed


@per_both
def test_a_sampler_that_is_the_policy_changes_nothing(per):
    base, moved = (table_with_tokens(*one_batch(), eta) for eta in (0.0, ETA))
    same = {"sampler_logp": base.logp, "sampler_tokens": base.tokens.logp.numpy()}
    sampled = [dataclasses.replace(table, **same) for table in (base, moved)]
    for estimator, weights in FORMS.items():
        pairs = [
            (slope(base, estimator=estimator, per=per), slope(sampled[0], estimator=estimator, per=per)),
            (importance(base, moved, weights=weights, per=per), importance(*sampled, weights=weights, per=per)),
        ]
        for plain, weighed in pairs:
            if weights == "sequence":  # the same sums times 1
                assert (plain.value, plain.stderr) == (weighed.value, weighed.stderr)
                assert np.array_equal(plain.influence, weighed.influence)
            assert weighed.value == pytest.approx(plain.value, rel=1e-11)
            assert weighed.stderr == pytest.approx(plain.stderr, rel=1e-11)


def test_what_is_refused():
    sums = every_answer()
    without = dataclasses.replace(sums, sampler_tokens=None)
    assert np.isfinite(slope(without, estimator="exact").value)
    for call in (lambda: slope(without), lambda: curvature(without, estimator="causal"), lambda: by_lag(without)):
        with pytest.raises(ValueError, match="sums.sampler_tokens: None, expected those of a table measured with keep"):
            call()
    with pytest.raises(ValueError, match="pass_at_k: of rollouts with sampler_logp, expected the policy's own"):
        forecast(sums, {}, RIGHT.ravel().astype(float), pass_at_k=[1])
    far = dataclasses.replace(sums, sampler_logp=sums.logp - 400.0)
    with pytest.raises(ValueError, match="sums.sampler_logp: base log-weights of rollout 0 reach 400 nats"):
        slope(far, estimator="exact")
    vanished = dataclasses.replace(sums, sampler_logp=sums.logp + 1000.0)
    with pytest.raises(ValueError, match="the base weights of all rollouts with tokens vanish"):
        slope(vanished, estimator="exact")
    other = dataclasses.replace(sums, sampler_logp=sums.sampler_logp - 0.1)
    for moved in (dataclasses.replace(sums, sampler_logp=None), other):
        with pytest.raises(ValueError, match="moved.sampler_logp: not that of base"):
            importance(sums, moved)


def test_tables_keep_what_the_sampler_said():
    sums = every_answer()
    rows = [5, 2, 700]
    joined = SequenceSums.concatenate([sums.take(rows[:2]), sums.take(rows[2:])])
    ends = np.concatenate([[0], np.cumsum(sums.n_tokens).astype(int)])
    assert np.array_equal(joined.sampler_logp, sums.sampler_logp[rows])
    assert np.array_equal(
        joined.sampler_tokens, np.concatenate([sums.sampler_tokens[ends[i] : ends[i + 1]] for i in rows])
    )


class TestAudit:
    CHECKS = ("logp_plus_entropy", "dlogp", "base_weight", "token_weight", "token_logp_plus_entropy", "token_dlogp")

    @pytest.mark.parametrize("name", ["hotter", "older"])
    def test_z_is_standard_and_silent_for_a_sampler_that_is_known(self, name):
        audits = [on_policy_audit(base) for _, (base,) in drawn_by(name, 200, 32)]
        for check in self.CHECKS:
            z = np.array([getattr(audit, check).z for audit in audits])
            assert abs(z.mean()) < 0.35 and 0.8 < z.std() < 1.25, check
        assert sum(len(audit.warnings) for audit in audits) <= 2

    def test_every_mean_is_that_of_its_definition(self):
        # every answer was drawn once, so that the means of whole rollouts are 0 exactly
        audit = on_policy_audit(every_answer())
        for check in self.CHECKS[:3]:
            assert abs(getattr(audit, check).mean) < 1e-12

    def test_a_sampler_without_support_is_named_as_the_cause(self):
        _, (base,) = next(drawn_by("top-p", 1, 64))
        found = base_weights(base)
        lost = 1 - found.mean_weight
        audit = on_policy_audit(base)
        assert audit.base_weight.mean == pytest.approx(-lost, rel=1e-12) and lost > 0.05
        said = [text for text in audit.warnings if "top-p, top-k or min-p" in text and "cannot stand" in text]
        assert [text.split(":")[0] for text in said] == ["base weight", "token weight"]
        assert not [text for text in audit.warnings if "sampler_logp is of other tokens" in text]

    def test_logps_of_other_tokens_are_named_as_the_cause(self):
        _, (base,) = next(drawn_by("hotter", 1, 64))
        tokens = base.sampler_tokens - 0.1
        wrong = dataclasses.replace(base, sampler_tokens=tokens, sampler_logp=base.sampler_logp - 0.1 * base.n_tokens)
        assert any("sampler_logp is of other tokens" in text for text in on_policy_audit(wrong).warnings)


def test_base_weights_are_judged_as_a_measurement():
    _, (base,) = next(drawn_by("older", 1, 64))
    found = base_weights(base)
    weight = np.exp(base.logp - base.sampler_logp)
    assert found.ess == pytest.approx(weight.sum() ** 2 / np.sum(weight**2), rel=1e-12)
    assert found.mean_weight == pytest.approx(weight.mean(), rel=1e-12)
    assert found.moved_value == pytest.approx(importance(base, base).base_value, rel=1e-12)
    assert found.base_value == pytest.approx(base.entropy.sum() / base.n_tokens.sum(), rel=1e-12)
    assert importance_diagnostics(found).verdict in ("reliable", "strained")
    few = base.take(range(16))
    heavy = dataclasses.replace(few, sampler_logp=few.logp - 9.0 * (np.arange(16) == 3))
    (warning, *_) = slope(heavy, estimator="exact").warnings
    assert warning == "the base weights of the rollouts, of another sampler, have an ESS of 1.0 of 16, below 10"


def test_baselines_are_weighted_means_of_the_other_rollouts_of_the_prompt():
    (prompt, sequence), (base,) = next(drawn_by("older", 1, 4))
    right = RIGHT[prompt, sequence].astype(float)
    weight, terms, longer = np.exp(base.logp - base.sampler_logp), np.empty(32), np.empty(32)
    dlogp = np.split(base.tokens.dlogp.numpy(), np.cumsum(base.n_tokens).astype(int)[:-1])
    for i in range(32):
        others = [j for j in range(32) if j // 8 == i // 8 and j != i]
        terms[i] = (right[i] - np.average(right[others], weights=weight[others])) * base.dlogp[i]
        left = [
            base.n_tokens[i] - k - np.average(np.maximum(base.n_tokens[others] - k, 0), weights=weight[others])
            for k in range(1, len(dlogp[i]) + 1)
        ]
        longer[i] = np.sum(dlogp[i] * left)
    found = forecast(base, {}, right)
    assert found.reward.slope.value == pytest.approx(np.average(terms, weights=weight), rel=1e-10)
    assert found.length.slope.value == pytest.approx(np.average(longer, weights=weight), rel=1e-10)
