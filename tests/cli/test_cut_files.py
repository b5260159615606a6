"""Files that end in the middle, as after a copy that broke off: one line names the file, and nothing is written."""

import shutil
from pathlib import Path

import pytest
from commands import completed

from dentropy.cli import main

CASES = {
    "the policy": ("before/model.safetensors", "probe --direction v.safetensors --policy before"),
    "the policy after": ("after/model.safetensors", "probe --after after --step-size 1e-3"),
    "a direction": ("v.safetensors", "probe --direction v.safetensors"),
    "rollouts": ("rollouts.jsonl", "probe --direction v.safetensors"),
    "the update's rollouts": ("rewarded.jsonl", "probe --update-rollouts rewarded.jsonl --step-size 1e-3"),
    "prompts": ("prompts.jsonl", "sample"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kept", [0.4, 0.97])
def test_the_file_is_named(case, kept, place, tmp_path, monkeypatch, capsys):
    file, words = CASES[case]
    for name in ("before", "after"):
        shutil.copytree(place / name, tmp_path / name)
    for name in ("v.safetensors", "rollouts.jsonl", "rewarded.jsonl", "prompts.jsonl"):
        shutil.copy(place / name, tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: int(kept * len(whole))])
    monkeypatch.chdir(tmp_path)
    assert main(completed(f"{words} --device cpu")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and Path(file).name in err
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*unfinished*"))
