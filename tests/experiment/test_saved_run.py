"""A run folder read back: what the run itself says, and every refusal."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet

import dentropy
from dentropy import ProbeResult, SavedRun

HERE = Path(__file__).parent


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_it_says_what_the_run_said(run, result):
    saved = ProbeResult.load(str(run))
    assert saved.folder == run and saved.content == result.content and saved.update_tokens() is None
    assert saved.summary() == result.summary() and saved._repr_html_() == result._repr_html_()
    expected = result.columns()
    found = saved.columns()
    assert list(found) == list(expected)
    for name, column in expected.items():
        assert found[name].dtype == column.dtype
        np.testing.assert_array_equal(found[name], column)
    pandas.testing.assert_frame_equal(saved.to_pandas(), pandas.read_csv(run / "rollouts.csv"), rtol=0, atol=0)


def test_it_shows_itself_in_one_line(run, result):
    said = f"{result.date}, 32 rollouts of 4 prompts, {result.batch.n_tokens} tokens, float32 on cpu>"
    assert repr(ProbeResult.load(run)) == f"<SavedRun: {run}, {said}"


@pytest.mark.parametrize("version", [1, 2])
def test_runs_of_earlier_versions_are_read(version):
    folder = HERE / f"schema_{version}"
    saved = ProbeResult.load(folder)
    assert saved.content == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert saved.summary() == (folder / "summary.txt").read_text(encoding="utf-8").rstrip("\n")
    assert repr(saved).startswith(f"<SavedRun: {folder}, ") and "\n" not in repr(saved)
    assert saved._repr_html_().count("<tr>") == 1 + len(saved.content["measured"])
    assert saved.update_tokens() is None
    with pytest.raises(ValueError, match=r"rollouts\.parquet: no such file, expected the table"):
        saved.columns()


def test_numbers_that_are_not_finite_and_large_ids_come_back(copy):
    content = json.loads((copy / "results.json").read_text())
    content["n_sequences"] = 2
    (copy / "results.json").write_text(json.dumps(content))
    (copy / "rollouts.parquet").unlink()  # as older runs are
    (copy / "rollouts.csv").write_text("group,entropy,logp\n9007199254740993,nan,-inf\n-1,1e-320,0.1\n")
    found = ProbeResult.load(copy).columns()
    assert found["group"].tolist() == [9007199254740993, -1]
    assert np.isnan(found["entropy"][0]) and found["entropy"][1] == 1e-320
    assert found["logp"].tolist() == [-np.inf, 0.1]


def test_the_tokens_of_the_update_are_those_of_the_file(copy):
    content = json.loads((copy / "results.json").read_text())
    names = "total tokens kl entropy_bonus momentum weight_decay unexplained cosine clip_factor noise_fraction"
    content["update_attribution"] = dict.fromkeys(names.split(), 0.5) | {"estimator": "causal", "optimizer": "sgd"}
    lists = {name: [] for name in ("by_advantage", "by_entropy", "by_position", "by_end")}
    content["update_attribution"] |= {"n_sequences": 1, "n_tokens": 2, **lists}
    (copy / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"update_tokens\.parquet: no such file"):
        ProbeResult.load(copy).update_tokens()
    (copy / "update_tokens.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"update_tokens\.parquet: cannot be read \(.*\), expected"):
        ProbeResult.load(copy).update_tokens()
    columns = {"token": np.array([3, 4]), "share": np.array([0.1, -0.2])}
    parquet.write_table(pyarrow.table(columns), copy / "update_tokens.parquet")
    found = ProbeResult.load(copy).update_tokens()
    assert list(found) == ["token", "share"] and found["share"].dtype == np.float64
    assert found["token"].tolist() == [3, 4] and found["share"].tolist() == [0.1, -0.2]


def test_tables_of_another_run_are_refused(copy):
    (copy / "rollouts.parquet").unlink()
    path = copy / "rollouts.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"rollouts\.csv: 31 rows, expected 32 as results\.json says"):
        ProbeResult.load(copy).columns()
    path.write_text("".join(lines) + "1,2\n")
    with pytest.raises(ValueError, match=r"rollouts\.csv: cannot be read \(.*\), expected a table as dentropy writes"):
        ProbeResult.load(copy).columns()


def test_other_folders_are_refused_and_the_name_is_public(tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        ProbeResult.load(tmp_path)
    assert "SavedRun" in dir(dentropy) and dentropy.SavedRun is SavedRun
