"""A probe that explains its update: what it runs, writes and shows."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from models import random_batch, random_direction, random_model
from report_page import Page

from dentropy import Policy, measure, policy_gradient_step, probe, sample, update_attribution
from dentropy.experiment import update_tokens
from dentropy.experiment.probe import tokens_to_run
from dentropy.experiment.report.page import html
from dentropy.experiment.run_folder import load
from dentropy.passes import reverse_mode, slope_gradient

STEP, ETAS = 1e-3, (-1e-3, 1e-3)


@pytest.fixture(scope="module")
def setting():
    policy = Policy(random_model("llama"))
    batch = sample(policy, [[5, 6, 7], [8], [9, 10], [11]], per_prompt=4, max_new_tokens=8)
    step = policy_gradient_step(policy, random_batch(1, rollouts=12, reward=True), step_size=STEP, optimizer="sgd")
    return policy, batch, step


@pytest.fixture(scope="module")
def result(setting):
    policy, batch, step = setting
    return probe(policy, batch, step.direction(), ETAS, update=step)


def test_one_reverse_pass_serves_parameters_and_tokens(setting, monkeypatch):
    policy, batch, step = setting
    ran, counts = [], []

    def counted(policy, batch, *args, **kwargs):
        ran.append(batch.n_tokens)
        return reverse_mode.gradient(policy, batch, *args, **kwargs)

    monkeypatch.setattr(slope_gradient, "gradient", counted)
    found = probe(policy, batch, step.direction(), ETAS, update=step, progress=counts.append)
    assert sum(ran) == batch.n_tokens and len(ran) == 4
    assert sum(counts) == tokens_to_run(policy, batch, ETAS, update=step)
    without = probe(policy, batch, step.direction(), ETAS)
    assert found.cost["update"] == 4 * step.batch.n_tokens and found.cost["tangent"] == 3
    assert found.cost["tokens"] - without.cost["tokens"] == 5 * step.batch.n_tokens + 2 * batch.n_tokens
    assert "4 with derivatives over the update's, and" in found.summary()
    for name, share in without.parameters.items():
        assert found.parameters[name] == pytest.approx(share, rel=1e-4, abs=1e-7)


def test_it_is_the_attribution_of_the_causal_slope(setting, result):
    policy, batch, step = setting
    sums = measure(policy, batch, step.direction(), keep_tokens=True)
    found = update_attribution(policy, batch, step, sums)
    np.testing.assert_allclose(result.update.share, found.share, rtol=1e-4, atol=1e-9)
    assert result.update.total == result.slopes["causal"].value
    assert abs(result.update.unexplained) < 1e-4 * abs(found.share).sum()


def test_the_run_folder_has_every_token_and_the_sums(setting, result, tmp_path):
    policy, batch, step = setting
    folder = result.save(tmp_path / "run")
    table, entry = pd.read_parquet(folder / "update_tokens.parquet"), load(folder)["update_attribution"]
    assert list(table) == ["rollout", "position", "token", "advantage", "weight", "logp", "entropy", "share"]
    for i in range(len(step.batch)):
        assert table.token[table.rollout == i].tolist() == step.batch.response(i)
    assert table.share.dtype == np.float64 and table.share.sum() == pytest.approx(entry["tokens"], rel=1e-12)
    named = sum(entry[name] for name in ("tokens", "kl", "entropy_bonus", "momentum", "weight_decay", "unexplained"))
    assert named == pytest.approx(entry["total"], rel=1e-9)
    by_hand = {
        "by_advantage": np.sign(table.advantage),
        "by_entropy": np.ceil(5 * table.entropy.rank(method="max") / len(table)),
        "by_position": np.floor(np.log2(table.position)),
        "by_end": table.token != 2,
    }
    for name, label in by_hand.items():
        sums = [row["contribution"] for row in entry[name]]
        assert sum(sums) == pytest.approx(entry["tokens"], rel=1e-9)
        assert sum(row["tokens"] for row in entry[name]) == len(table)
        if name != "by_entropy":  # where two quantiles meet in one value is a matter of convention
            assert sorted(sums) == pytest.approx(sorted(table.share.groupby(label).sum()))
    assert len(entry["by_entropy"]) == 5 and entry["by_end"][0]["name"] == "end token"
    assert "update-tokens" in (folder / "report.html").read_text()


def test_groups_have_error_bars(setting, result, tmp_path):
    policy, batch, step = setting
    folder = result.save(tmp_path / "run")
    table, entry = pd.read_parquet(folder / "update_tokens.parquet"), load(folder)["update_groups"]
    ends = (table.token == 2) & ~table.duplicated(["rollout", "token"])
    for row, inside in zip(entry, (table.advantage > 0, ends), strict=True):
        assert row["tokens"] == inside.sum()
        assert row["share"]["value"] == pytest.approx(table.share[inside].sum(), rel=1e-3, abs=1e-7)
        assert row["rest"]["value"] == pytest.approx(result.slopes["causal"].value - row["share"]["value"], rel=1e-9)
        assert row["share"]["stderr"] > 0 and row["rest"]["interval"][0] < row["rest"]["value"]
    page = shown(result)
    assert [row["name"] for row in entry] == ["positive advantage", "end token"]
    assert "What groups of tokens make" in page.text and "The rest of the update without them" in page.text


def test_more_groups_by_name(setting):
    policy, batch, step = setting
    counts, names = [], ["negative advantage", "end token"]
    settings = dict(update=step, update_groups=names)
    found = probe(policy, batch, step.direction(), ETAS, parameters=False, progress=counts.append, **settings)
    assert list(found.update_groups) == ["positive advantage", "end token", "negative advantage"]
    assert sum(counts) == tokens_to_run(policy, batch, ETAS, False, **settings)
    assert found.cost["tangent"] == 3 and found.cost["tokens"] == sum(counts) - step.batch.n_tokens - batch.n_tokens
    with pytest.raises(ValueError, match="groups: 'odd', expected one of"):
        probe(policy, batch, step.direction(), ETAS, update=step, update_groups=["odd"])
    with pytest.raises(ValueError, match="update_groups: end token without an update"):
        probe(policy, batch, step.direction(), ETAS, update_groups=["end token"])


def test_without_an_update_there_is_none(setting, tmp_path):
    policy, batch, step = setting
    found = probe(policy, batch, step.direction(), ETAS, parameters=False)
    folder = found.save(tmp_path / "run")
    assert json.loads((folder / "results.json").read_text())["update_attribution"] is None
    assert (
        not (folder / "update_tokens.parquet").exists() and "update-tokens" not in (folder / "report.html").read_text()
    )


def shown(result, **changes):
    update = dataclasses.replace(result.update, **changes)
    found = dataclasses.replace(result, update=update)
    return Page(html(found.content, [], update_tokens.largest(update)))


def test_the_page_colours_only_what_can_be_relied_on(result):
    reliable = shown(result, noise_fraction=0.1)
    assert "a part of 0.100 is noise of the rollouts" in reliable.text
    rows = reliable.all("h4", within="update-tokens")
    sums = np.bincount(result.update.rollout, result.update.share, len(result.update.batch))
    order = np.argsort(-abs(sums), kind="stable")
    assert [row["text"].split("prompt")[0] for row in rows] == [f"Rollout {i}" for i in order]
    for noise, said in ((0.3, "are not coloured"), (1.2, "all noise, and not coloured"), (None, "is not known")):
        noisy = shown(result, noise_fraction=noise)
        assert said in noisy.text and not noisy.all("span", class_="token", within="update-tokens")


def test_another_update_is_said_to_be_one(setting, result):
    policy, batch, step = setting
    assert "is not the step rebuilt" not in shown(result).text
    found = probe(policy, batch, random_direction(policy.model), ETAS, update=step, parameters=False)
    assert found.parameters is None and abs(found.update.cosine) < 0.5
    assert found.update.unexplained == pytest.approx(found.update.total - found.update.tokens)
    text = shown(found).text
    assert "the cosine of the two is" in text and "Unexplained" in text
    assert torch.is_grad_enabled()


def test_proxies_are_graded(setting, result, tmp_path):
    folder = result.save(tmp_path / "run")
    table, entry = pd.read_parquet(folder / "update_tokens.parquet"), load(folder)["proxies"]
    assert [row["name"] for row in entry] == ["covariance", "surprise", "STEER", "discriminant"]
    p = np.exp(table.logp)
    by_hand = -table.advantage * p * (1 - p) * (table.logp + table.entropy)
    inside = table.weight != 0
    graded = entry[2]
    assert graded["rank_correlation"]["value"] == pytest.approx(by_hand[inside].corr(table.share[inside], "spearman"))
    assert graded["r_squared"]["value"] == pytest.approx(by_hand[inside].corr(table.share[inside]) ** 2)
    assert graded["mean"] == pytest.approx(by_hand[inside].mean())
    page = shown(result)
    assert "Published proxies, graded" in page.text and "−A π(1 − π)(log π + h)" in page.text
    change = next(c for c in result.changes if c.eta == result.step_size)
    ends = change.measured.interval()
    if not (change.below_noise or ends[0] <= 0 <= ends[1]):
        assert graded["right_sign"] == (graded["mean"] * change.measured.delta > 0)
    else:
        assert graded["right_sign"] is None
