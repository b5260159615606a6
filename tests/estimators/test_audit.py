"""The on-policy audit: silent on rollouts of the policy itself, loud on rollouts of another one."""

import dataclasses

import numpy as np
import pytest
from oracles import TinyPolicy
from scipy import stats
from tables import POLICY, columns, in_one_group, take, with_value

from dentropy.estimators import on_policy_audit
from dentropy.stats.tables import SequenceSums

COLUMNS = columns()


def scored_by(scored, seed=0, n_groups=64, n_batches=1):
    prompts, sequences = POLICY.sample(np.random.default_rng(seed), n_batches, n_groups=n_groups)
    return [POLICY.table(*drawn, scored) for drawn in zip(prompts, sequences, strict=True)]


def test_expectations_are_zero_under_enumeration():
    probability = np.exp(COLUMNS["logp"])
    for column in (COLUMNS["logp"] + COLUMNS["entropy"], COLUMNS["dlogp"]):
        assert np.abs((probability * column).sum(1)).max() < 1e-12


def test_on_policy_z_is_standard_and_silent():
    audits = [on_policy_audit(sums) for sums in scored_by(COLUMNS, n_batches=1000)]
    for name in ("logp_plus_entropy", "dlogp"):
        z = np.array([getattr(audit, name).z for audit in audits])
        assert abs(z.mean()) < 0.15 and 0.9 < z.std() < 1.15
    assert sum(len(audit.warnings) for audit in audits) <= 2


def test_mean_and_stderr():
    (sums,) = scored_by(COLUMNS)
    check = on_policy_audit(sums).logp_plus_entropy
    values = sums.logp + sums.entropy
    assert check.mean == pytest.approx(values.mean(), rel=1e-12)
    lacking = max(0.0, -values.sum() * np.sum(values**3) / np.sum(values**2))
    assert check.stderr == pytest.approx(np.sqrt(np.sum(values**2) + lacking) / 256, rel=1e-12)
    assert check.z == pytest.approx(check.mean / check.stderr, rel=1e-12)
    assert on_policy_audit(in_one_group(sums)).logp_plus_entropy == check  # prompts make no difference


@pytest.mark.parametrize("n_groups, per_group", [(1, 64), (2, 32), (4, 16)])
def test_few_prompts_raise_no_false_alarm(n_groups, per_group):
    prompts, sequences = POLICY.sample(np.random.default_rng(1), 500, n_groups=n_groups, per_group=per_group)
    found = [on_policy_audit(POLICY.table(*b, COLUMNS)) for b in zip(prompts, sequences, strict=True)]
    assert np.mean([bool(audit.warnings) for audit in found]) <= 0.01  # 24 to 31% with errors between 2 prompts
    z = [audit.logp_plus_entropy.z for audit in found if audit.logp_plus_entropy.z is not None]
    assert len(z) > 350 and np.std(z) == pytest.approx(1, abs=0.15)


def test_one_prompt_is_enough_to_see_another_policy():
    prompts, sequences = POLICY.sample(np.random.default_rng(2), 1, n_groups=1, per_group=512)
    (warning, *_) = on_policy_audit(POLICY.table(prompts[0], sequences[0], TinyPolicy(scale=0.5).columns())).warnings
    assert warning.startswith("logp + entropy")


def rare(count, rollouts, chance):
    """The audit of so many rollouts of one token, `count` of them the rare one of that chance."""
    drawn = np.arange(rollouts) < count
    logp = np.where(drawn, np.log(chance), np.log1p(-chance))
    entropy = np.full(rollouts, -chance * np.log(chance) - (1 - chance) * np.log1p(-chance))
    ones, index = np.ones(rollouts), np.arange(rollouts)
    dlogp = np.where(drawn, 1 - chance, -chance)
    sums = SequenceSums(n_tokens=ones, logp=logp, entropy=entropy, dlogp=dlogp, group=index, rollout=index)
    return on_policy_audit(sums)


@pytest.mark.parametrize("chance", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("rollouts", [64, 512, 4096])
def test_false_alarms_of_a_nearly_deterministic_policy_by_enumeration(chance, rollouts):
    """The number of rare tokens is binomial: false alarms are a sum over it. With Σ v² alone it is 8% and more."""
    counts = np.arange(0, rollouts + 1) if rollouts < 100 else np.arange(0, min(rollouts, 1000))
    alarmed = [bool(rare(count, rollouts, chance).warnings) for count in counts]
    assert stats.binom.pmf(counts, rollouts, chance)[alarmed].sum() < 3e-4


def test_a_policy_too_sure_for_its_rollouts_has_no_z_and_says_why():
    few = rare(0, 512, 0.001).logp_plus_entropy
    assert few.z is None and few.stderr is None and "nats of entropy in all, below 50" in few.stderr_reason
    many = rare(0, 40_000, 0.001)  # 40 were expected
    assert many.logp_plus_entropy.z > 100 and len(many.warnings) == 2


@pytest.mark.parametrize(
    "scored, names",
    [
        (TinyPolicy(scale=0.6).columns(), {"logp + entropy"}),  # another temperature
        (columns(0.6), {"dlogp"}),  # stale weights, older along the direction
        (COLUMNS | {"logp": np.roll(COLUMNS["logp"], 1, axis=1)}, {"logp + entropy"}),  # those of other tokens
    ],
)
def test_rollouts_of_another_policy_are_named(scored, names):
    (sums,) = scored_by(scored, n_groups=256)
    warnings = on_policy_audit(sums).warnings
    assert names <= {warning.split(":")[0] for warning in warnings}
    for cause in ("another temperature", "top-p or top-k", "stale weights", "shift between tokens"):
        assert all(cause in warning for warning in warnings)
    # The direction has no part in logp + entropy.
    for warning in warnings:
        assert ("an update made from these very rollouts" in warning) == warning.startswith("dlogp")


def test_top_k_sampling_is_named():
    (sums,) = scored_by(COLUMNS, n_groups=512)
    greedy = sums.logp > np.median(sums.logp)  # only likely rollouts are left, as after top-k or top-p
    audit = on_policy_audit(take(sums, greedy))
    assert audit.logp_plus_entropy.mean > 0 and audit.warnings[0].startswith("logp + entropy")


def test_without_a_tangent():
    (sums,) = scored_by({name: COLUMNS[name] for name in ("n_tokens", "logp", "entropy")})
    audit = on_policy_audit(sums)
    assert audit.dlogp is None and audit.logp_plus_entropy.z is not None


def test_a_policy_without_choice_has_no_z():
    (sums,) = scored_by({name: COLUMNS[name] for name in ("n_tokens", "logp", "entropy")})
    audit = on_policy_audit(dataclasses.replace(sums, logp=np.zeros(256), entropy=np.zeros(256)))
    assert audit.logp_plus_entropy.z is None and audit.warnings == []
    assert audit.logp_plus_entropy.stderr_reason == "every rollout has 0"


def test_bad_input():
    (sums,) = scored_by(COLUMNS)
    with pytest.raises(ValueError, match="sums.logp: nan for rollout 3"):
        on_policy_audit(with_value(sums, "logp", 3, np.nan))
    with pytest.raises(ValueError, match="sums: no rows"):
        on_policy_audit(take(sums, []))
