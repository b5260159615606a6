"""What a command line may say: all that the README and earlier versions say is taken, without running anything."""

import re
import shlex
from pathlib import Path

import pytest

from dentropy.cli import parser
from dentropy.cli.probe import DEFAULT_GROUPS, UPDATE_GROUPS
from dentropy.passes.token_groups import GROUPS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
OTHERS = re.search(r"`OTHERS` is\s+`(.*?)`", README, re.DOTALL)[1]
COMMANDS = re.findall(r"(?:^|`|&& )dentropy (demo|(?:probe|sample|show) [^`\n]+)", README, re.MULTILINE)
# Every option there was before the parser had a class of its own, in all the forms that argparse takes.
SAMPLE, PROBE = "sample --policy p --prompts q --out o", "probe --policy p --rollouts r --out o"
EARLIER = [
    "demo --out d --seed 3",
    "show run",
    f"{SAMPLE} --per-prompt 4 --max-new-tokens 8 --temperature 0.7 --top-p 1 --top-k 0 --seed 1",
    f"{SAMPLE} --dtype float64 --device cpu --trust-remote-code",
    f"{PROBE} --after a --step-size 1e-6 --dtype bfloat16 --device cuda:0 --trust-remote-code",
    f"{PROBE} --direction v --etas -1e-6 5e-7 .5 -inf --prompt-set fixed --token-budget 64 --compile-layers",
    f"{PROBE} --direction=v --etas=1e-6 --prompt-set=random --token-budget=auto --skip-parameters --pass-at-k 1 4",
    f"{PROBE} --update-rollouts u --split --optimizer sgd --optimizer-state s --max-grad-norm 1 --step-size=-1",
    f"{PROBE} --update-rollouts u --after a --append-eos --max-new-tokens 8 --temperature 1 --reward-column c --step 3",
    f"{PROBE} --direction v --append-eos <|im_end|>",
    f"{PROBE} --update-rollouts u --update-groups {' '.join(UPDATE_GROUPS)}",
    "probe --etas -1e-6 1e-6 --roll r --pol p --dir v --out o",
]


@pytest.mark.parametrize("text", sorted({*COMMANDS, *EARLIER}))
def test_it_is_taken(text):
    words = shlex.split(text.replace("OTHERS", OTHERS), posix=True)
    # As `main` does: a negative number is a value, not an option.
    words = [f" {word}" if re.fullmatch(r"-(inf|[\d.].*)", word) else word for word in words]
    options = vars(parser().parse_args(words))
    assert callable(options["run"])
    for name in re.findall(r"--([a-z-]+)", " ".join(words)):
        name = name.replace("-", "_")
        (full,) = [name] if name in options else [option for option in options if option.startswith(name)]
        assert options[full] is not None and options[full] is not False and options[full] != ()


def test_the_readme_was_understood():
    assert len(COMMANDS) > 12 and {command.split()[0] for command in COMMANDS} == {"demo", "probe", "sample", "show"}


def test_values_are_what_was_written():
    options = parser().parse_args([*f"{PROBE} --direction v --etas".split(), " -1e-6", "5e-7", " -inf"])
    assert options.etas == [-1e-6, 5e-7, float("-inf")] and options.token_budget == "auto"


def test_groups_of_the_updates_tokens_are_those_that_there_are():
    assert [name.replace("-", " ") for name in UPDATE_GROUPS] == list(GROUPS)
    assert DEFAULT_GROUPS == ("positive-advantage", "negative-advantage")
    assert parser().parse_args([*PROBE.split(), "--update-groups"]).update_groups == []
