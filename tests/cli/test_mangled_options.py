"""Command lines of words that are good and words that are not."""

import contextlib
import io
from random import Random

import pytest
from harness import HangsError, limited

from dentropy.cli import main
from dentropy.experiment import probe
from dentropy.rollouts import sampling

# Values by option: those that a command takes, and those that it must not. None stands for no value.
PATHS = ("", "./none", "../none", "full", "a\x1b[2Jb", "a\x00b", "n" * 300, "pipe", "/dev/null", "\udcff")
NUMBERS = ("nan", "inf", "-inf", "1e400", "1e-400", "x", "", "0x1", "1e300", "1e-310", None)
COUNTS = ("0", "-1", "1.5", "x", "", "1e3", None)
PROBE = {
    "--policy": (("before",), PATHS),
    "--rollouts": (("rollouts.jsonl",), (*PATHS, "broken.jsonl", "empty.jsonl", "v.safetensors")),
    "--direction": (("v.safetensors",), (*PATHS, "rollouts.jsonl")),
    "--step-size": (("1e-4", "2"), (*NUMBERS, "0", "-1")),
    "--etas": (("1e-4", "-1e-3", "0.5"), (*NUMBERS, "0")),
    "--prompt-set": (("random", "fixed"), ("Random", "", None)),
    "--token-budget": (("auto", "64"), (*COUNTS, "AUTO")),
    "--dtype": (("float32",), ("int8", "float", "", None)),
    "--device": (("cpu",), ("toaster", "cuda:99", "meta", "cpu:x", None)),
    "--out": (("new", "deep/er"), ("full", "v.safetensors", "pipe", "n" * 300, "/dev/null/x", None)),
    "--optimizer": ((), ("sgd", "adamw", "lion")),
    "--after": ((), ("before", "./none")),
    "--loud": ((), (None,)),
}
SAMPLE = {
    "--policy": PROBE["--policy"],
    "--prompts": (("prompts.jsonl",), (*PATHS, "broken.jsonl", "empty.jsonl", "v.safetensors")),
    "--per-prompt": (("1", "8"), COUNTS),
    "--max-new-tokens": (("3", "8"), (*COUNTS, "1000", "99999999999999999999999")),
    "--temperature": (("1", "0.7"), (*NUMBERS, "0", "-1")),
    "--top-p": (("1",), ("0.9", "nan", "x")),
    "--top-k": (("0",), ("50", "x")),
    "--seed": (("0", "7"), ("x", "1.5", None)),
    "--dtype": PROBE["--dtype"],
    "--device": PROBE["--device"],
    "--out": (("new.jsonl",), ("full", "rollouts.jsonl", "pipe", "n" * 300, "none/x", "/dev/null", None)),
}
REQUIRED = {"probe": ("--policy", "--rollouts", "--direction", "--out"), "sample": ("--policy", "--prompts", "--out")}


class ReachedError(Exception):
    """Every option was taken: the work would begin."""


def line(random: Random):
    """(words, whether all of them are good)."""
    command, options = random.choice([("probe", PROBE), ("sample", SAMPLE)])
    chosen = set(REQUIRED[command]) | set(random.sample(sorted(options), random.randint(0, 3)))
    if random.random() < 0.1:
        chosen.discard(random.choice(REQUIRED[command]))
    words, good = [command], set(REQUIRED[command]) <= chosen
    bad = random.choice(sorted(chosen)) if random.random() < 0.8 else None
    for option in sorted(chosen):
        takes, refuses = options[option]
        fine = bool(takes) and option != bad
        good = good and fine
        value = random.choice(takes if fine else refuses)
        words += [option] if value is None else [option, value]
    return words, good


@pytest.fixture
def stopped(monkeypatch, place):
    """Commands end where the passes would begin, and the policy is loaded once."""
    import os

    from dentropy import Policy

    def reached(*_, **__):
        raise ReachedError

    load, loaded = Policy.from_pretrained, {}

    def once(source, **settings):
        key = (str(source), str(settings))
        if key not in loaded:
            loaded[key] = load(source, **settings)
        return loaded[key]

    monkeypatch.setattr(probe, "measure", reached)
    monkeypatch.setattr(sampling, "_generate", reached)
    monkeypatch.setattr(Policy, "from_pretrained", once)
    if not (place / "pipe").exists():
        os.mkfifo(place / "pipe")


def outcome(words):
    err, out = io.StringIO(), io.StringIO()
    try:
        with limited(), contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            code = main(words)
    except ReachedError:
        return "read", None
    except (Exception, HangsError, SystemExit) as error:
        return "failed", f"traceback: {error!r:.300}"
    lines = [said for said in err.getvalue().splitlines() if said.startswith("dentropy: ")]
    if code != 2 or out.getvalue() or len(lines) != 1 or "\x1b" in lines[0]:
        return "failed", f"exit code {code}, {err.getvalue()!r}, {out.getvalue()!r}"
    return "refused", None


@pytest.mark.parametrize("count", [160, pytest.param(400, marks=pytest.mark.slow)])
def test_options(place, stopped, count):
    there, faults, counts = sorted(place.rglob("*")), {}, {"read": 0, "refused": 0, "failed": 0}
    for index in range(count):
        words, good = line(Random(index))
        found, fault = outcome(words)
        counts[found] += 1
        if fault is None and found != ("read" if good else "refused"):
            fault = f"was {found}"
        if fault is None and sorted(place.rglob("*")) != there:
            fault = "left files behind"
        if fault is not None:
            faults.setdefault(fault[:60], f"{words}: {fault}")
    assert not faults, "\n".join(faults.values())
    assert min(counts["read"], counts["refused"]) > count / 10
