"""A probe that says which kinds of its update's tokens move entropy, and how far published proxies can be trusted."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from models import random_batch, random_model
from report_page import Page
from scipy.stats import pearsonr, spearmanr

from dentropy import PackedBatch, Policy, measure, policy_gradient_step, probe, sample, slope
from dentropy.experiment import proxies
from dentropy.experiment.probe import tokens_to_run
from dentropy.experiment.report.page import html
from dentropy.experiment.run_folder import load

STEP = 1e-3
NAMES = ("positive advantage", "negative advantage", "end token", "positive advantage")


@pytest.fixture(scope="module")
def setting():
    policy = Policy(random_model("llama"))
    batch = sample(policy, [[5, 6, 7], [8], [9, 10], [11]], per_prompt=4, max_new_tokens=8)
    rollouts = random_batch(1, rollouts=12, reward=True)
    step = policy_gradient_step(policy, rollouts, step_size=STEP, optimizer="sgd")
    counts = []
    found = probe(policy, batch, step.direction(), [STEP], update=step, groups=NAMES, progress=counts.append)
    assert sum(counts) == tokens_to_run(policy, batch, [STEP], update=step, groups=NAMES)
    return policy, batch, step, found


@pytest.fixture(scope="module")
def folder(setting, tmp_path_factory):
    return setting[3].save(tmp_path_factory.mktemp("groups") / "run")


def masks(table):
    """By the columns of the table alone; 2 is the end token."""
    ends = table.token == 2
    first = ends & (ends.groupby(table.rollout).cumsum() == 1)
    return {"positive advantage": table.advantage > 0, "negative advantage": table.advantage < 0, "end token": first}


def test_groups_are_sums_of_shares_with_the_errors_of_a_slope(setting, folder):
    policy, batch, step, found = setting
    table, content = pd.read_parquet(folder / "update_tokens.parquet"), load(folder)
    entries = {row["name"]: row for row in content["update_groups"]}
    assert list(entries) == list(NAMES[:3])
    whole = next(row for row in content["slope"] if row["estimator"] == "causal")
    for name, mask in masks(table).items():
        entry = entries[name]
        assert entry["tokens"] == mask.sum() > 0
        assert entry["share"]["value"] == pytest.approx(table.share[mask].sum(), rel=1e-4)
        assert entry["share"]["value"] + entry["rest"]["value"] == pytest.approx(whole["value"], rel=1e-9)
    kept = dataclasses.replace(step.batch, advantage=np.where(step.coefficients.advantage > 0, 0.0, 1.0))
    kept = dataclasses.replace(kept, advantage=kept.advantage * step.coefficients.advantage)
    without = policy_gradient_step(policy, kept, step_size=STEP, optimizer="sgd")
    really = slope(measure(policy, batch, without.direction()))
    rest = entries["positive advantage"]["rest"]
    assert rest["value"] == pytest.approx(really.value, rel=1e-4)
    assert rest["stderr"] == pytest.approx(really.stderr, rel=1e-4)


def test_the_complement_runs_no_pass_and_the_others_only_the_rollouts_they_need(setting, folder):
    _, batch, step, found = setting
    table = pd.read_parquet(folder / "update_tokens.parquet")
    lengths = table.groupby("rollout").size()
    ran = {
        name: lengths[table.rollout[mask & (table.weight != 0)].unique()].sum() for name, mask in masks(table).items()
    }
    assert ran["positive advantage"] < step.batch.n_tokens
    expected = ran["positive advantage"] + ran["end token"] + 2 * batch.n_tokens
    assert found.cost["groups"] == expected and f"{expected:,} tokens for groups of these" in found.summary()


def test_a_group_without_tokens_is_there_and_empty(setting):
    policy, batch, _, _ = setting
    unended = PackedBatch.from_lists([[5], [5]], [[7, 3], [8]], group=[0, 0], reward=[1, 0])
    step, counts = policy_gradient_step(policy, unended, step_size=STEP, optimizer="sgd"), []
    found = probe(policy, batch, step.direction(), [STEP], update=step, groups=["end token"], progress=counts.append)
    assert found.content["update_groups"] == [{"name": "end token", "tokens": 0, "share": None, "rest": None}]
    assert sum(counts) == tokens_to_run(policy, batch, [STEP], update=step, groups=["end token"])
    rows = [e["text"] for e in Page(html(found.content, [])).all("tr", within="update-groups")]
    assert "".join(rows[1].split("\n")) == "end token0" and found.content["cost"]["groups"] == 0


def test_the_page_has_their_changes(setting):
    found = setting[3]
    page = Page(html(found.content, []))
    share = found.groups["end token"].share
    values = page.values(within="update-groups")
    for value in (share.value, share.stderr, found.groups["end token"].rest.value):
        assert any(shown == pytest.approx(STEP * value) for shown in values)
    text = "".join(e["text"] for e in page.all("section") if e["attrs"]["id"] == "update-groups")
    assert "held as it is" not in text
    adam = dataclasses.replace(found, update=dataclasses.replace(found.update, optimizer="adamw"))
    assert "second moment held as it is" in Page(html(adam.content, [])).text


def test_proxies_are_graded_on_the_shares(setting, folder):
    policy, _, step, _ = setting
    t = pd.read_parquet(folder / "update_tokens.parquet")
    p = np.exp(t.logp)
    by_hand = {
        "covariance": -(t.logp - t.logp.mean()) * (t.advantage - t.advantage.mean()),
        "surprise": -t.advantage * (t.logp + t.entropy),
        "STEER": -t.advantage * p * (1 - p) * (t.logp + t.entropy),
    }
    entries = {row["name"]: row for row in load(folder)["proxies"]}
    assert list(entries) == [*by_hand, "discriminant"]
    counted = t.weight != 0
    for name, proxy in by_hand.items():
        proxy, share = proxy[counted], t.share[counted]
        assert entries[name]["rank_correlation"]["value"] == pytest.approx(spearmanr(proxy, share).statistic)
        assert entries[name]["r_squared"]["value"] == pytest.approx(pearsonr(proxy, share).statistic ** 2)
        assert entries[name]["sign_agreement"]["value"] == np.mean(np.sign(proxy) == np.sign(share))
        assert entries[name]["mean"] == pytest.approx(proxy.mean())
    noise = load(folder)["update_attribution"]["noise_fraction"]
    row = entries["discriminant"]["r_squared"]
    assert (row["corrected"] is None) == (noise >= 1)
    if noise < 1:
        assert row["corrected"] == pytest.approx(row["value"] / (1 - noise))
    text = "".join(e["text"] for e in Page((folder / "report.html").read_text()).all("td", within="proxies"))
    assert f"{entries['STEER']['rank_correlation']['value']:.2f}".replace("-", "−") in text


def test_many_rollouts_are_graded_on_some(setting):
    policy, _, step, found = setting
    some = proxies.grades(step, found.update, most=7)  # every second one of 12
    inside = found.update.rollout % 2 == 0
    assert some.keys() == found.proxies.keys()
    proxy = -found.update.advantage * (found.update.logp + found.update.entropy)
    counted = inside & (found.update.weight != 0)
    assert some["surprise"].mean == pytest.approx(proxy[counted].mean())
    share = found.update.share[counted]
    assert some["surprise"].rank_correlation.value == pytest.approx(spearmanr(proxy[counted], share).statistic)


@pytest.mark.parametrize(
    "ends, measured, said",
    [((1, 2), (0.1, 0.2), True), ((1, 2), (-0.2, -0.1), False), ((-1, 2), (0.1, 0.2), None), ((1, 2), (-1, 1), None)],
)
def test_the_sign_of_the_change(setting, monkeypatch, ends, measured, said):
    found = setting[3]
    change = found.changes[0]
    grade = dataclasses.replace(found.proxies["surprise"], mean_interval=ends)
    monkeypatch.setattr(type(change.measured), "interval", lambda self: measured)
    change = dataclasses.replace(change, noise_floor=0.0)
    assert proxies.entry({"surprise": grade}, [change], STEP)[0]["right_sign"] is said
    assert proxies.entry({"surprise": grade}, [change], 2 * STEP)[0]["right_sign"] is None


def test_bad_groups_are_refused_before_any_work(setting):
    policy, batch, step, _ = setting
    with pytest.raises(ValueError, match="groups: 'odd', expected one of 'positive advantage'"):
        probe(policy, batch, step.direction(), [STEP], update=step, groups=["odd"])
    with pytest.raises(ValueError, match="groups: 'end token' without an update"):
        probe(policy, batch, step.direction(), [STEP], groups=["end token"])
