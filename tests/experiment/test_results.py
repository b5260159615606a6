import dataclasses
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from runs import ETAS, STEP

import dentropy
from dentropy.experiment import entries, figures

RESULTS_MD = Path(dentropy.__file__).with_name("results.md")


@pytest.fixture(scope="module")
def content(run):
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def rows(run):
    return pd.read_csv(run / "rollouts.csv")


def test_every_number_about_the_batch(content, rows, result):
    assert content["schema_version"] == 3
    assert content["n_sequences"] == len(rows) == 32
    assert content["n_tokens"] == rows.n_tokens.sum() == result.batch.n_tokens
    assert content["n_groups"] == rows.group.nunique() == 4
    assert content["scale"] == 1 / rows.n_tokens.sum()
    assert content["base_entropy"] == pytest.approx(rows.entropy.sum() / rows.n_tokens.sum(), rel=1e-14)
    assert (content["temperature"], content["dtype"], content["device"]) == (1.0, "float32", "cpu")
    assert (content["step_size"], content["prompts"], content["seeds"]) == (STEP, "random", {"rollouts": 0})
    assert content["versions"]["dentropy"] == dentropy.__version__ and content["versions"]["torch"]
    assert content["not_finite"] == {}


def test_it_says_when_it_was_made_and_how_long_it_took(content, result):
    made = content["provenance"]
    age = datetime.now(UTC) - datetime.fromisoformat(made["date"])
    assert 0 <= made["seconds"] <= age.total_seconds() + 1 < 86400 and made["command"] is None
    command = "dentropy probe --etas -1e-6 '1 2'"
    assert dataclasses.replace(result, command=command).content["provenance"]["command"] == command


def slope_terms(rows):
    mean = rows.entropy.sum() / rows.n_tokens.sum()
    return {
        "causal": rows.dentropy + rows.entropy_to_go - mean * rows.length_to_go,
        "exact": rows.dentropy + (rows.entropy - mean * rows.n_tokens) * rows.dlogp,
        "mixed": rows.dentropy + rows.entropy_to_go - mean * rows.n_tokens * rows.dlogp,
        "uncorrected": rows.dentropy + rows.entropy_to_go,
    }


def test_slopes_follow_from_the_columns(content, rows):
    D, mean = rows.n_tokens.sum(), rows.entropy.sum() / rows.n_tokens.sum()
    expected = slope_terms(rows)
    for name, x in expected.items():
        np.testing.assert_allclose(rows[f"slope_{name}"], x / D, rtol=1e-10, atol=1e-16)
    assert [entry["estimator"] for entry in content["slope"]] == ["causal", "exact", "mixed"]
    for entry in content["slope"]:
        x = expected[entry["estimator"]]
        assert entry["value"] == pytest.approx(x.sum() / D, rel=1e-10)
        assert entry["value"] == pytest.approx(entry["pathwise"] + entry["score"] + entry["length_correction"])
        assert entry["pathwise"] == pytest.approx(rows.dentropy.sum() / D)
        assert entry["uncorrected"] == pytest.approx(expected["uncorrected"].sum() / D)
        assert entry["other_answers"] == pytest.approx(entry["score"] + entry["length_correction"])
        by_hand = jackknife(rows, lambda r, name=entry["estimator"]: slope_terms(r)[name].sum() / r.n_tokens.sum())
        assert entry["stderr"] == entry["jackknife_stderr"] == pytest.approx(by_hand, rel=1e-9)
        pathwise = (rows.dentropy - entry["pathwise"] * rows.n_tokens) / D
        assert entry["part_stderrs"]["pathwise"] == pytest.approx(clustered(pathwise, rows.group), rel=1e-9)
        dsize = rows.length_to_go if entry["estimator"] == "causal" else rows.n_tokens * rows.dlogp
        other = x - rows.dentropy - entry["other_answers"] * rows.n_tokens
        other -= dsize.sum() / D * (rows.entropy - mean * rows.n_tokens)
        assert entry["part_stderrs"]["other_answers"] == pytest.approx(clustered(other / D, rows.group), rel=1e-9)


def test_measurements_follow_from_the_columns(content, rows):
    D, mean = rows.n_tokens.sum(), rows.entropy.sum() / rows.n_tokens.sum()
    causal = next(entry for entry in content["slope"] if entry["estimator"] == "causal")
    assert [entry["eta"] for entry in content["measured"]] == list(ETAS)
    exact = next(entry for entry in content["slope"] if entry["estimator"] == "exact")
    both = [(k, entry, name) for k, entry in enumerate(content["measured"]) for name in ("prefix", "sequence")]
    for k, change, weights in both:
        entry, slope = (change, causal) if weights == "prefix" else (change["sequence"], exact)
        assert entry["weights"] == weights
        log_weight, moved_column, size_column, contribution = COLUMNS[weights]
        w, moved, size = (np.exp(rows[f"{log_weight}_{k}"]), rows[f"{moved_column}_{k}"], size_of(rows, size_column, k))
        R = (w * moved).sum() / (w * size).sum()
        assert entry["moved_entropy"] == pytest.approx(R, rel=1e-12)
        assert entry["delta"] == pytest.approx(R - mean, rel=1e-9)
        base = (rows.entropy - mean * rows.n_tokens) / D
        np.testing.assert_allclose(
            rows[f"{contribution}_{k}"], w * (moved - mean * size) / (w * size).sum() - base, atol=1e-15
        )
        assert rows[f"{contribution}_{k}"].sum() == pytest.approx(entry["delta"], rel=1e-9)
        by_hand = jackknife(rows, lambda r, k=k, weights=weights: change_of_entropy(r, k, weights))
        assert entry["stderr"] == entry["jackknife_stderr"] == pytest.approx(by_hand, rel=1e-9)
        assert entry["predicted_linear"] == pytest.approx(change["eta"] * slope["value"])
        assert entry["predicted_linear_stderr"] == pytest.approx(abs(change["eta"]) * slope["stderr"])
        assert change["predicted_uncorrected"] == pytest.approx(change["eta"] * causal["uncorrected"])
        both_ways = jackknife(
            rows, lambda r, k=k: change_of_entropy(r, k, "prefix") - change_of_entropy(r, k, "sequence")
        )
        between = change["delta"] - change["sequence"]["delta"]
        assert change["sequence"]["difference"] == pytest.approx(between, rel=1e-6)
        assert change["sequence"]["difference_stderr"] == pytest.approx(both_ways, rel=1e-6)
        assert entry["ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum())
        assert entry["ess_fraction"] == pytest.approx(entry["ess"] / len(rows))
        wT = w * size
        assert entry["ess_tokens"] == pytest.approx(wT.sum() ** 2 / (wT**2).sum())
        assert entry["max_weight"] == pytest.approx(w.max() / w.sum()) and entry["mean_weight"] == pytest.approx(
            w.mean()
        )
        assert entry["log_weight_quantiles"]["p25"] == pytest.approx(rows[f"{log_weight}_{k}"].quantile(0.25))


# Of log-weights, entropies, sizes and contributions.
COLUMNS = {
    "prefix": ("prefix_log_weight", "prefix_entropy", "prefix_tokens", "delta_contribution"),
    "sequence": ("log_weight", "moved_entropy", None, "delta_contribution_sequence"),
}


def size_of(rows, name, k):
    return rows.n_tokens if name is None else rows[f"{name}_{k}"]


def change_of_entropy(rows, k, weights):
    log_weight, moved, size, _ = COLUMNS[weights]
    w = np.exp(rows[f"{log_weight}_{k}"])
    moved = (w * rows[f"{moved}_{k}"]).sum() / (w * size_of(rows, size, k)).sum()
    return moved - rows.entropy.sum() / rows.n_tokens.sum()


def jackknife(rows, value):
    """The standard error of value(rows) by leaving out one prompt at a time."""
    left_out = np.array([value(rows[rows.group != label]) for label in rows.group.unique()])
    return np.sqrt((left_out.size - 1) * left_out.var())


def clustered(psi, group):
    sums = psi.groupby(group).sum()
    return np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum())


def test_the_audit_accounts_for_every_token_and_contribution(content, rows, result):
    audit = content["audit"]
    assert audit["tokens_used"] == audit["tokens_expected"] == rows.n_tokens.sum()
    assert audit["rollouts_used"] == audit["rollouts_expected"] == len(rows)
    names = {"slope_causal", "slope_exact", "slope_mixed", *(f"delta_{k}" for k in range(4))}
    assert audit["contributions"].keys() == names | {"parameters"}
    for name in names:
        pair = audit["contributions"][name]
        assert pair["sum"] == pytest.approx(pair["expected"], rel=1e-9)
    shares = audit["contributions"]["parameters"]  # another pass of float32 arithmetic
    assert shares["sum"] == pytest.approx(shares["expected"], abs=1e-5 * sum(map(abs, result.parameters.values())))
    check = audit["on_policy"]["logp_plus_entropy"]
    assert check["mean"] == pytest.approx((rows.logp + rows.entropy).mean())
    assert check["z"] == pytest.approx(check["mean"] / check["stderr"])
    assert audit["on_policy"]["dlogp"]["mean"] == pytest.approx(rows.dlogp.mean())
    assert audit["warnings"] == result.audit.warnings


def test_a_token_lost_on_the_way_shows_in_the_audit(result):
    generated = result.batch.generated.copy()
    generated[result.batch.offsets[6] - result.batch.response_lens[5] - 1] = True  # the last token of a prompt
    longer = dataclasses.replace(result.batch, generated=generated)
    audit = dataclasses.replace(result, batch=longer).content["audit"]
    assert audit["tokens_used"] == audit["tokens_expected"] - 1


def test_rows_are_those_of_the_batch_whatever_the_order_of_the_table(result, rows):
    order = np.random.default_rng(0).permutation(32)
    base = type(result.base)(**{name: column[order] for name, column in result.base.columns().items()})
    estimates = {
        name: dataclasses.replace(estimate, contributions=estimate.contributions[order])
        for name, estimate in result.slopes.items()
    }

    def shuffled_form(form, **more):
        names = ("log_weights", "contributions", "moved_entropy", "size")
        columns = {name: getattr(form.measured, name)[order] for name in names}
        return dataclasses.replace(form, measured=dataclasses.replace(form.measured, **columns), **more)

    changes = [shuffled_form(change, sequence=shuffled_form(change.sequence)) for change in result.changes]
    second, exact = (
        dataclasses.replace(found, contributions=found.contributions[order])
        for found in (result.curvature, result.exact_curvature)
    )
    shuffled = dataclasses.replace(
        result, base=base, slopes=estimates, curvature=second, exact_curvature=exact, changes=changes
    )
    columns = shuffled.columns()
    assert list(columns) == list(rows.columns)
    for name, column in columns.items():
        np.testing.assert_array_equal(column, rows[name])
    assert rows.rollout.tolist() == list(range(32)) and rows.reward.tolist() == result.batch.reward.tolist()


def test_floats_come_back_bit_for_bit(run, result):
    rows = pd.read_csv(run / "rollouts.csv", dtype=str)
    assert [float(text) for text in rows.entropy] == result.base.entropy.tolist()


def test_the_table_holds_the_columns_bit_for_bit(run, result):
    rows, columns = pd.read_parquet(run / "rollouts.parquet"), result.columns()
    assert list(rows.columns) == list(columns)
    for name, column in columns.items():
        assert rows[name].dtype == column.dtype and rows[name].to_numpy().tobytes() == column.tobytes(), name


def test_attribution_adds_up_to_the_slope(content, result):
    slopes = {entry["estimator"]: entry["value"] for entry in content["slope"]}
    scale = sum(map(abs, result.parameters.values()))
    for name, parts in content["attribution"].items():
        whole = slopes["exact" if name == "by_length" else "causal"]
        assert sum(part["contribution"] for part in parts) == pytest.approx(whole, abs=1e-5 * scale), name
        assert name not in ("by_length", "by_position", "by_lag") or all(part["stderr"] > 0 for part in parts)
    assert sum(part["tokens"] for part in content["attribution"]["by_position"]) == content["n_tokens"]
    assert sum(part["rollouts"] for part in content["attribution"]["by_length"]) == content["n_sequences"]


def test_the_horizon_and_what_it_leaves_out_make_the_slope(content, result, monkeypatch):
    assert result.base.n_tokens.max() <= 16 and content["horizon"] is None
    monkeypatch.setattr(entries, "HORIZON", 3)
    found, causal = entries.horizon(result.base, "random"), result.slopes["causal"]
    beyond = sum(lags["contribution"] for lags in content["attribution"]["by_lag"] if lags["first"] > 3)
    assert found["tokens"] == 3 and found["value"] + found["left_out"] == pytest.approx(causal.value, rel=1e-9)
    assert found["left_out"] == pytest.approx(beyond, rel=1e-9) and found["stderr"] > 0 < found["left_out_stderr"]


def test_the_curvature_follows_from_the_columns(content, rows):
    d, mean = rows.n_tokens.sum(), content["base_entropy"]
    causal, exact = (entry["value"] for entry in content["slope"][:2])
    terms = (
        (rows.entropy - mean * rows.n_tokens) * (rows.dlogp**2 + rows.d2logp)
        + 2 * rows.dlogp * (rows.dentropy - exact * rows.n_tokens)
        + rows.d2entropy
    )
    assert content["curvature"]["exact"]["value"] == pytest.approx(terms.sum() / d, rel=1e-9)
    np.testing.assert_allclose(rows.curvature_exact, terms / d, rtol=1e-9, atol=1e-12)
    terms = rows.entropy_to_go_2 - mean * rows.length_to_go_2 + rows.d2entropy
    terms += 2 * (rows.dentropy_to_go - causal * rows.length_to_go)
    found = content["curvature"]
    assert found["value"] == pytest.approx(terms.sum() / d, rel=1e-9)
    np.testing.assert_allclose(rows.curvature, terms / d, rtol=1e-9, atol=1e-12)
    assert found["exact"]["difference"] == pytest.approx(found["value"] - found["exact"]["value"])
    assert found["part_stderrs"].keys() == {"score", "cross", "pathwise"} and found["exact"]["difference_stderr"] > 0
    assert content["trust"]["linear_until"] == pytest.approx(content["trust"]["eta_star"] / 10)


def test_every_field_is_documented(content, rows):
    text = RESULTS_MD.read_text()
    documented = set(re.findall(r"`([a-z_0-9]+?)(?:_K)?`", text))
    fields = set(content) | set(content["slope"][0]) | set(content["measured"][0]) | set(content["audit"])
    fields |= set(content["fresh_check"]) | set(content["audit"]["on_policy"]) | set(content["attribution"])
    fields |= set(content["curvature"]) | set(content["trust"]) | {"tokens", "left_out", "left_out_stderr"}
    fields |= set(content["measured"][0]["sequence"]) | set(content["curvature"]["exact"])
    fields |= {re.sub(r"_\d+$", "", column) for column in rows.columns}
    assert fields - documented == set()


def test_the_recipe_for_the_contributions_works_as_written(run, rows, monkeypatch):
    text = RESULTS_MD.read_text()
    names = {}
    monkeypatch.chdir(run)
    exec(re.search("```python\n(.*?)```", text, re.DOTALL)[1], names)
    for name in ("causal", "exact", "mixed", "uncorrected"):
        np.testing.assert_allclose(names[name], rows[f"slope_{name}"], rtol=1e-10, atol=1e-16)
    np.testing.assert_allclose(names["curvature"], rows.curvature, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(names["curvature_exact"], rows.curvature_exact, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(names["delta"], rows.delta_contribution_0, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(names["delta_sequence"], rows.delta_contribution_sequence_0, rtol=1e-10, atol=1e-15)


def test_the_fresh_check_is_written(content, result):
    assert content["fresh_check"] == dataclasses.asdict(result.fresh)


def test_numbers_json_does_not_know_are_named(result):
    first, second, *others = result.changes
    infinite = dataclasses.replace(second.measured, mean_weight=float("inf"))
    changes = (first, dataclasses.replace(second, measured=infinite), *others)
    content = dataclasses.replace(result, changes=changes).content
    assert content["not_finite"] == {"measured.1.mean_weight": "inf"}
    assert content["measured"][1]["mean_weight"] is None
    json.dumps(content, allow_nan=False)


def test_a_name_that_is_no_text_is_written_by_its_code(result):
    content = dataclasses.replace(result, source={"rollouts": "r\udcff.jsonl"}).content
    assert content["source"] == {"rollouts": "r\\udcff.jsonl"}
    json.dumps(content, ensure_ascii=False).encode("utf-8")


def test_the_content_is_made_once(result, tmp_path, monkeypatch):
    calls = []
    versions = entries.versions
    monkeypatch.setattr(entries, "versions", lambda: calls.append(1) or versions())
    found = dataclasses.replace(result)
    monkeypatch.setattr(figures, "FIGURES", {})
    found.summary(), found.save(tmp_path / "run"), found.summary()
    assert len(calls) == 1
