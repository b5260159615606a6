"""An update is not judged on the rollouts that made it, unless nothing can tell; and then it is said."""

import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from commands import completed

from dentropy import measure, policy_gradient_direction, slope
from dentropy.cli import main
from dentropy.cli.apart import check_files
from dentropy.demo.run import draw_rollouts, load_policy
from dentropy.rollouts.overlap import split

UPDATE = "probe --step-size 1e-4 --etas 1e-4 --skip-parameters"
CONDITION = "Valid only if these rollouts did not make the update"


def run(text, tmp_path, capsys):
    code = main(completed(f"{text} --out {tmp_path}/run"))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("kind", ["the file", "a link to it", "a copy with rewards", "most of it"])
def test_the_rollouts_that_make_an_update_may_not_judge_it(kind, place, tmp_path, capsys):
    judges, makers = place / "rewarded.jsonl", tmp_path / "u.jsonl"
    lines = judges.read_text().splitlines(keepends=True)
    if kind == "a link to it":
        os.link(judges, makers)
    elif kind != "the file":
        kept = lines if kind == "a copy with rewards" else lines[: len(lines) * 3 // 4]
        judges = tmp_path / "r.jsonl"
        judges.write_text("".join(json.dumps(json.loads(line) | {"step": 1}) + "\n" for line in lines[::-1]))
        makers.write_text("".join(kept))
    makers = place / "rewarded.jsonl" if kind == "the file" else makers
    code, out, err = run(f"{UPDATE} --rollouts {judges} --update-rollouts {makers}", tmp_path, capsys)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "biased, often to the wrong sign; expected rollouts drawn apart, or --split" in err


def test_a_smaller_overlap_is_warned_of(place, tmp_path, capsys):
    makers, others = ((place / name).read_text().splitlines() for name in ("others.jsonl", "rollouts.jsonl"))
    judges = others + makers[::2]
    (tmp_path / "r.jsonl").write_text("\n".join(judges))
    text = f"{UPDATE} --rollouts {tmp_path}/r.jsonl --update-rollouts rewarded.jsonl"
    code, _, err = run(text, tmp_path, capsys)
    assert code == 0 and f"of the {len(judges)} rollouts of --rollouts are among them, more than chance gives" in err


def test_split_makes_the_update_from_some_prompts_and_judges_it_on_others(place, tmp_path, capsys):
    text = f"{UPDATE} --rollouts rewarded.jsonl --update-rollouts rewarded.jsonl --split"
    code, out, _ = run(text, tmp_path, capsys)
    assert code == 0 and "split: made from 1 prompts, judged on 2 others" in out
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content["n_groups"] == 2 and content["source"]["split"] == "made from 1 prompts, judged on 2 others"


@pytest.mark.parametrize("update", ["--direction v.safetensors", "--step-size 1e-3 --after after"])
def test_where_nothing_can_tell_the_summary_names_the_condition(update, tmp_path, capsys):
    code, out, _ = run(f"probe {update} --etas 1e-3 --skip-parameters", tmp_path, capsys)
    assert code == 0 and CONDITION in out
    assert main(["show", f"{tmp_path}/run"]) == 0 and CONDITION in capsys.readouterr().out


@pytest.mark.parametrize(
    "policy, after, rollouts, said",
    [
        ("run/checkpoint-3", None, "completions_00003.jsonl", "sampled by checkpoint-2"),
        ("run/checkpoint-3/", None, "logs/completions_00003.parquet", "sampled by checkpoint-2"),
        ("run/checkpoint-2", None, "completions_00003.jsonl", None),
        ("run/checkpoint-2", "run/checkpoint-3", "completions_00003.jsonl", "made the update to checkpoint-3"),
        ("run/checkpoint-2", "run/checkpoint-9", "completions_00005.jsonl", "made the update to checkpoint-5"),
        ("run/checkpoint-2", "run/checkpoint-3", "completions_00002.jsonl", "sampled by checkpoint-1"),
        ("a-model", None, "completions_00003.jsonl", None),
        ("run/checkpoint-3", None, "rollouts.jsonl", None),
    ],
)
def test_trl_counts_a_step_before_it_saves(policy, after, rollouts, said):
    options = SimpleNamespace(policy=policy, after=after, rollouts=rollouts, update_rollouts=None, split=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_files(options)
    assert len(found) == (said is not None)
    if said:
        assert str(found[0].message).startswith("--rollouts: completions_0000") and said in str(found[0].message)


@pytest.mark.slow
def test_an_update_judged_on_its_own_rollouts_has_the_wrong_sign_and_a_split_one_has_not():
    """The demo's policy and eight updates of 32 prompts each; the truth is from 512 rollouts drawn anew."""
    policy, tokenizer = load_policy()
    fresh = draw_rollouts(policy, tokenizer, 64, 8, seed=100)
    found = {"same": [], "split": []}
    for seed in range(1, 9):
        batch = draw_rollouts(policy, tokenizer, 32, 8, seed=seed)
        for name, (judges, makers) in (("same", (batch, batch)), ("split", split(batch, batch))):
            update = policy_gradient_direction(policy, makers, step_size=1e-4)
            found[name].append([slope(measure(policy, rollouts, update)).value for rollouts in (judges, fresh)])
    (same, truth), (apart, truth_apart) = (np.array(values).T for values in found.values())
    assert z(truth) < -3 and z(same) > 3
    assert apart.mean() < 0 and abs(z(apart - truth_apart)) < 3


def z(values):
    """Their mean in its standard errors."""
    return np.mean(values) / (np.std(values, ddof=1) / len(values) ** 0.5)
