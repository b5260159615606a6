"""The on-policy audit: silent on rollouts of the policy itself, loud on rollouts of another one."""

import dataclasses

import numpy as np
import pytest
from oracles import TinyPolicy
from tables import POLICY, columns, in_one_group, take, with_value

from dentropy.estimators import on_policy_audit

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
    means = (sums.logp + sums.entropy).reshape(64, 4).mean(1)
    assert check.mean == pytest.approx(means.mean(), rel=1e-12)
    assert check.stderr == pytest.approx(means.std(ddof=1) / 8, rel=1e-12)
    assert check.z == pytest.approx(check.mean / check.stderr, rel=1e-12)


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


def test_top_k_sampling_is_named():
    (sums,) = scored_by(COLUMNS, n_groups=512)
    greedy = sums.logp > np.median(sums.logp)  # only likely rollouts are left, as after top-k or top-p
    audit = on_policy_audit(take(sums, greedy))
    assert audit.logp_plus_entropy.mean > 0 and audit.warnings[0].startswith("logp + entropy")


def test_without_a_tangent_and_without_groups():
    (sums,) = scored_by({name: COLUMNS[name] for name in ("n_tokens", "logp", "entropy")})
    audit = on_policy_audit(sums)
    assert audit.dlogp is None and audit.logp_plus_entropy.z is not None
    one = on_policy_audit(in_one_group(sums)).logp_plus_entropy
    assert one.stderr is None and one.z is None and "one group" in one.stderr_reason


def test_a_policy_without_choice_has_no_z():
    (sums,) = scored_by({name: COLUMNS[name] for name in ("n_tokens", "logp", "entropy")})
    audit = on_policy_audit(dataclasses.replace(sums, logp=np.zeros(256), entropy=np.zeros(256)))
    assert audit.logp_plus_entropy.z is None and audit.warnings == []
    assert audit.logp_plus_entropy.stderr_reason == "every group has the same sum"


def test_bad_input():
    (sums,) = scored_by(COLUMNS)
    with pytest.raises(ValueError, match="sums.logp: nan for rollout 3"):
        on_policy_audit(with_value(sums, "logp", 3, np.nan))
    with pytest.raises(ValueError, match="sums: no rows"):
        on_policy_audit(take(sums, []))
