"""What goes wrong in the middle of a probe: values that are not finite, weights that move."""

import numpy as np
import pytest
import torch
from models import random_batch, random_direction, random_model

from dentropy import PackedBatch, Policy, probe
from dentropy.experiment.summary import summary
from dentropy.model import fingerprint

BROKEN = 39  # a token id
ETAS = [1e-3]


def setting(bad=(3, 7)):
    """A policy, rollouts of which `bad` have the token BROKEN, and a direction."""
    drawn = random_batch(rollouts=12)
    prompts = [[min(t, BROKEN - 1) for t in drawn.prompt(i)] for i in range(len(drawn))]
    responses = [[min(t, BROKEN - 1) for t in drawn.response(i)] for i in range(len(drawn))]
    for i in bad:
        responses[i][1] = BROKEN
    batch = PackedBatch.from_lists(prompts, responses, group=drawn.group)
    policy = Policy(random_model("llama"))
    return policy, batch, random_direction(policy.model)


def break_token(policy, value=float("nan")):
    """Its embedding is `value` from now on: everything behind it in its rollout is not finite."""

    def broken(module, inputs, output):
        return output.masked_fill((inputs[0] == BROKEN)[..., None], value)

    policy.model.model.embed_tokens.register_forward_hook(broken)


class TestNotFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_by_default_the_first_is_named(self, value):
        policy, batch, direction = setting()
        policy.check_on(lambda: [np.array(batch.prompt(0))])
        break_token(policy, value)
        with pytest.raises(ValueError, match="^logp of rollout 3: nan at token 0, expected finite numbers"):
            probe(policy, batch, direction, ETAS)

    def test_dropped_they_are_counted_and_the_rest_is_as_without_them(self):
        policy, batch, direction = setting()
        policy.check_on(lambda: [np.array(batch.prompt(0))])
        others = np.delete(np.arange(len(batch)), [3, 7])
        want = probe(policy, batch.take(others), direction, ETAS)
        break_token(policy)
        found = probe(policy, batch, direction, ETAS, on_nonfinite="drop")
        assert found.dropped == (3, 7) and want.dropped == ()
        columns, expected = found.columns(), want.columns()
        assert columns.pop("rollout").tolist() == others.tolist() and len(expected.pop("rollout")) == len(others)
        assert all(np.array_equal(columns[name], expected[name]) for name in expected)
        audit = found.content["audit"]
        assert (audit["rollouts_used"], audit["rollouts_expected"]) == (10, 12)
        assert audit["rollouts_dropped"] == [3, 7]
        said = "2 rollouts dropped, whose statistics are not finite: 3, 7"
        assert said in audit["warnings"] and said in summary(found.content)

    def test_where_all_are_bad_it_is_an_error(self):
        policy, batch, direction = setting(bad=[2, 3])
        policy.check_on(lambda: [np.array(batch.prompt(0))])
        break_token(policy)
        with pytest.raises(ValueError, match="of rollout 0: nan"):
            probe(policy, batch.take([2, 3]), direction, ETAS, on_nonfinite="drop")

    def test_what_else_it_may_be_is_said(self):
        with pytest.raises(ValueError, match="on_nonfinite: 'ignore', expected one of"):
            probe(*setting(), ETAS, on_nonfinite="ignore")


def test_weights_that_change_between_microbatches():
    policy, batch, direction = setting()
    hidden, runs = policy.hidden, []

    def training(row):
        runs.append(row)
        if len(runs) == 3:
            policy.model.model.norm.weight.data[0] += 1e-3
        return hidden(row)

    policy.hidden = training
    with torch.no_grad(), pytest.raises(ValueError, match="^policy: model.norm.weight changed while the passes ran"):
        probe(policy, batch, direction, ETAS, token_budget=40)


def test_weights_are_hashed_once_before_and_once_behind_all_passes(monkeypatch):
    policy, counted, hashed = Policy(random_model("llama")), [], fingerprint.parameter_fingerprints
    monkeypatch.setattr(fingerprint, "parameter_fingerprints", lambda model: (counted.append(1), hashed(model))[1])
    with fingerprint.unchanged(policy.model):
        with fingerprint.unchanged(policy.model):  # a probe inside of a command
            pass
        assert len(counted) == 1
    assert len(counted) == 2
    before = hashed(policy.model)
    policy.model.model.norm.weight.data[0] += 1
    refused = pytest.raises(fingerprint.WeightsChangedError, match="^policy: model.norm.weight changed while")
    with refused, fingerprint.unchanged(policy.model, before):
        assert len(counted) == 2
