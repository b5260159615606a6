import sys

import pytest
from commands import DIRECTION, completed

from dentropy.cli import main

UPDATE = "probe --step-size 1 --update-rollouts"
PENALTY = f"{UPDATE} rewarded.jsonl --loss-kl 0.1 --loss-kl-reference"
BAD = {
    "no command": ("", "required"),
    "unknown command": ("prob", "invalid choice"),
    "unknown option": ("show old_run --loud", "unrecognized arguments: --loud"),
    "no rollouts file": (f"{DIRECTION} --rollouts none.jsonl", "none.jsonl: no such file"),
    "no policy": (f"{DIRECTION} --policy ./none", "none"),
    "no updated policy": ("probe --step-size 1 --after none", "--after:"),
    "no direction": ("probe --direction none", "none: no such file"),
    "direction is a folder": ("probe --direction full", "--direction: full: is a folder, expected a safetensors"),
    "float8 direction": ("probe --direction fp8.safetensors", "float8"),
    "not a direction": ("probe --direction rollouts.jsonl", "not a safetensors file"),
    "no update rollouts": (f"{UPDATE} none", "none: no such file"),
    "no optimizer state": (f"{UPDATE} rewarded.jsonl --optimizer-state none", "none"),
    "not an optimizer state": (f"{UPDATE} rewarded.jsonl --optimizer-state prompts.jsonl", "--optimizer-state:"),
    "broken JSON": (f"{DIRECTION} --rollouts broken.jsonl", "line 2: broken JSON"),
    "token outside the vocabulary": (f"{DIRECTION} --rollouts outside.jsonl", "token id 99 is outside the vocab"),
    "no rollouts in the file": (f"{DIRECTION} --rollouts empty.jsonl", "no rollouts"),
    "empty responses": (f"{DIRECTION} --rollouts empty_responses.jsonl", "all are empty"),
    "no rewards": (f"{UPDATE} others.jsonl", "no rewards"),
    "direction of another model": ("probe --direction other.safetensors", "other.weight"),
    "direction of another shape": ("probe --direction shape.safetensors", "lm_head.weight has shape (2,)"),
    "NaN weights": (f"{DIRECTION} --policy broken", "up_proj.weight"),
    "NaN weights after": ("probe --step-size 1 --after broken", "not finite"),
    "same weights after": ("probe --step-size 1 --after before", "equal to before"),
    "η = 0 only": (f"{DIRECTION} --etas 0", "η = 0 only"),
    "η twice": (f"{DIRECTION} --etas 1e-3 1e-3", "given 2 times"),
    "η without bounds": (f"{DIRECTION} --etas -inf", "expected finite numbers"),
    "η beyond float32": (f"{DIRECTION} --etas 1e300", "--etas: 1e+300, expected a size from"),
    "η below float32": (f"{DIRECTION} --etas 1e-310", "--etas: 1e-310, expected a size from"),
    "step size beyond float32": (f"{DIRECTION} --step-size 1e300", "etas: -1e+300, expected a size from"),
    "η that is no number": (f"{DIRECTION} --etas x", "invalid float value"),
    "no step size": ("probe --after after", "--step-size"),
    "negative step size": (f"{DIRECTION} --step-size -1e-6", "--step-size: -1e-06, expected a positive number"),
    "two updates": (f"{DIRECTION} --after after", "not allowed with"),
    "no update": ("probe", "one of the arguments"),
    "a cap without end tokens": (f"{DIRECTION} --max-new-tokens 8", "only with --append-eos"),
    "optimizer without update rollouts": (f"{DIRECTION} --optimizer sgd", "only with --update-rollouts"),
    "loss without update rollouts": (f"{DIRECTION} --loss-average token", "only with --update-rollouts"),
    "groups without update rollouts": (f"{DIRECTION} --update-groups end-token", "--update-groups: only with"),
    "a group of no such name": (f"{UPDATE} rewarded.jsonl --update-groups odd", "--update-groups: invalid choice"),
    "clip without log-probabilities": (
        f"{UPDATE} rewarded.jsonl --loss-clip 0.2 0.2",
        "--loss-clip: the rollouts have",
    ),
    "length without its length": (f"{UPDATE} rewarded.jsonl --loss-average length", "--loss-max-length: None with"),
    "penalty to nothing": (f"{UPDATE} rewarded.jsonl --loss-kl 0.1", "--loss-kl: 0.1 without --loss-kl-reference"),
    "no penalty": (f"{UPDATE} rewarded.jsonl --loss-kl-reference after", "--loss-kl-reference: without a coefficient"),
    "penalty without update rollouts": (f"{DIRECTION} --loss-kl-reference after", "only with --update-rollouts"),
    "penalty that is no number": (f"{PENALTY} after --loss-kl nan", "--loss-kl: nan, expected a finite number"),
    "no reference": (f"{PENALTY} ./none", "--loss-kl-reference: ./none: no such folder"),
    "reference that is not finite": (f"{PENALTY} broken", "--loss-kl-reference: weights that are not finite"),
    "reference of another vocabulary": (f"{PENALTY} wide", "--loss-kl-reference: 32 tokens, expected the policy's"),
    "one file for both": (f"{UPDATE} rollouts.jsonl", "rollouts.jsonl is the file of --rollouts: an update judged on"),
    "split of nothing": (f"{DIRECTION} --split", "--split: only with --update-rollouts"),
    "token budget in words": (f"{DIRECTION} --token-budget lots", "--token-budget: 'lots', expected auto or a whole"),
    "token budget of none": (f"{DIRECTION} --token-budget 0", "--token-budget: '0', expected auto or a whole"),
    "negative token budget": (f"{DIRECTION} --token-budget -5", "--token-budget: '-5', expected auto or a whole"),
    "rollouts are a folder": (f"{DIRECTION} --rollouts full", "full: a folder without .jsonl"),
    "dtype": (f"{DIRECTION} --dtype int8", "invalid choice"),
    "device": (f"{DIRECTION} --device toaster", "'toaster' is not a device"),
    "probe: folder with something in it": (f"{DIRECTION} --out full", "exists and is not empty"),
    "probe: out is a file": (f"{DIRECTION} --out prompts.jsonl", "exists and is not a folder"),
    "demo: folder with something in it": ("demo --out full", "exists and is not empty"),
    "top-p": ("sample --top-p 0.9", "another distribution"),
    "top-k": ("sample --top-k 50", "another distribution"),
    "temperature": ("sample --temperature 0", "--temperature: 0.0, expected a positive number"),
    "temperature beyond float32": ("sample --temperature 1e-40", "--temperature: 1e-40, expected a positive number"),
    "per-prompt": ("sample --per-prompt 0", "--per-prompt: 0, expected at least 1"),
    "too many tokens": ("sample --max-new-tokens 1000", "64 positions"),
    "no prompts file": ("sample --prompts none.jsonl", "none.jsonl: no such file"),
    "no prompts in the file": ("sample --prompts empty.jsonl", "no prompts"),
    "file is there": ("sample --out rollouts.jsonl", "exists, expected a new file"),
    "no folder for the file": (
        "sample --out nowhere/new.jsonl",
        "nowhere/new.jsonl cannot be written, expected a new file",
    ),
    "not a run": ("show full", "not a run folder"),
    "no such run": ("show none", "not a run folder"),
    "a run of another version": ("show old_run", "schema_version is 99"),
}


def test_a_missing_package_is_named_before_any_work(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(completed(DIRECTION)) == 2
    out, err = capsys.readouterr()
    assert out == "" and "matplotlib" in err and "pip install 'dentropy[probe]'" in err and err.count("\n") == 1


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, place, capsys):
    text, message = BAD[case]
    there = sorted(place.rglob("*"))
    assert main(completed(text)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dentropy: ") and err.count("\n") == 1 and message in err
    assert sorted(place.rglob("*")) == there
