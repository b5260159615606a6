"""A probe that explains its update: what it runs, writes and shows."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from models import random_batch, random_direction, random_model
from report_page import Page

from dentropy import Policy, ProbeResult, measure, policy_gradient_step, probe, sample, update_attribution
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
    assert found.cost["update"] == 2 * step.batch.n_tokens and found.cost["groups"] == 0
    assert found.cost["proxies"] == step.batch.n_tokens
    assert found.cost["tokens"] - without.cost["tokens"] == 3 * step.batch.n_tokens
    for name, share in without.parameters.items():
        assert found.parameters[name] == pytest.approx(share, rel=1e-4, abs=1e-7)


def test_of_one_prompt_no_pass_for_the_noise_is_counted(setting):
    policy, batch, step = setting
    one = batch.take(np.flatnonzero(batch.group == batch.group[0]))
    counts, settings = [], {"parameters": False, "update": step}
    found = probe(policy, one, step.direction(), ETAS, progress=counts.append, **settings)
    assert found.update.noise_fraction is None and found.cost["update"] == step.batch.n_tokens
    assert sum(counts) == found.cost["tokens"] == tokens_to_run(policy, one, ETAS, **settings)


def test_it_is_the_attribution_of_the_causal_slope(setting, result):
    policy, batch, step = setting
    sums = measure(policy, batch, step.direction(), keep_tokens=True)
    found = update_attribution(policy, batch, step, sums)
    np.testing.assert_allclose(result.update.share, found.share, rtol=1e-4, atol=1e-9)
    assert result.update.total == result.slopes["causal"].value
    assert repr(result.update).endswith(f"noise fraction  {result.update.noise_fraction:.2f}>")
    assert abs(result.update.unexplained) < 1e-4 * abs(found.share).sum()


def test_the_run_folder_has_every_token_and_the_sums(setting, result, tmp_path):
    policy, batch, step = setting
    folder = result.save(tmp_path / "run")
    table, entry = pd.read_parquet(folder / "update_tokens.parquet"), load(folder)["update_attribution"]
    assert list(table) == ["rollout", "position", "token", "advantage", "weight", "logp", "entropy", "share"]
    for i in range(len(step.batch)):
        assert table.token[table.rollout == i].tolist() == step.batch.response(i)
    read_back = ProbeResult.load(folder).update_tokens()
    assert all(np.array_equal(read_back[name], table[name]) for name in table) and list(read_back) == list(table)
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
    rows = reliable.all("b", within="update-tokens")
    sums = np.bincount(result.update.rollout, result.update.share, len(result.update.batch))
    order = np.argsort(-abs(sums), kind="stable")
    assert [row["text"] for row in rows] == [f"Rollout {i}" for i in order]
    for noise, said in (
        (0.3, "are not coloured"),
        (1.2, "may be all noise of the rollouts (1.20 of them"),
        (None, "is not known"),
    ):
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
