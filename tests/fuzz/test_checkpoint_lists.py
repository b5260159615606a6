"""Lists of checkpoints, for a replay: JSON and TOML."""

import json
import tomllib

import pytest
from harness import Format, run
from mangling import as_json, mangled, mangled_bytes
from test_json_lines import number

from dentropy.experiment.recorded_run import recorded_run

GOOD = {
    "checkpoints": [
        {"path": "a", "step": 0, "rollouts": "0.jsonl", "entropy": 1.5},
        {"path": "b", "step": 5, "rollouts": "5.jsonl", "made_update": False},
        {"path": "../c", "step": 10, "entropy": 1},
    ]
}
KINDS = {"path": str, "step": int, "rollouts": str, "made_update": bool, "entropy": (int, float)}


def as_toml(value) -> str:
    """Inline, but for the list itself; words that TOML has not as they are."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(str(name))} = {as_toml(x)}" for name, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return str(value).lower() if isinstance(value, (bool, float)) else json.dumps(value)


def written(value, suffix) -> bytes:
    if suffix == "json":
        return as_json(value)
    top = value.items() if isinstance(value, dict) else [("checkpoints", value)]
    return "\n".join(f"{as_toml(str(name))} = {as_toml(x)}" for name, x in top).encode("utf-8", "surrogatepass")


def make(suffix):
    def write(folder, random):
        path = folder / f"run.{suffix}"
        if random.random() < 0.3:
            path.write_bytes(mangled_bytes(written(GOOD, suffix), random))
        else:
            path.write_bytes(written(mangled(GOOD, random), suffix))
        return path

    return write


def entries(path):
    """What the libraries alone read, or None where the format forbids it."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8" if path.suffix == ".toml" else "utf-8-sig")
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or set(content) != {"checkpoints"} or not isinstance(content["checkpoints"], list):
        return None
    found = content["checkpoints"]
    if not all(isinstance(entry, dict) and good(entry) for entry in found):
        return None
    steps = [entry["step"] for entry in found]
    return found if len(found) > 1 and steps == sorted(set(steps)) else None


def good(entry):
    if not {"path", "step"} <= set(entry) <= set(KINDS):
        return False
    if any(
        isinstance(x, bool) != (name == "made_update") or not isinstance(x, KINDS[name]) for name, x in entry.items()
    ):
        return False
    return 0 <= entry["step"] <= 10**15 and number(entry.get("entropy", 0))


def forbidden(path, run):
    found = entries(path)
    if found is None:
        return f"the format forbids it: {path.read_bytes()[:300]!r}"
    for entry, one in zip(found, run.checkpoints, strict=True):
        judge = one.rollouts
        said = [one.step, one.path, judge and judge.path, judge is None or judge.made_update, one.logged_entropy]
        rollouts = None if "rollouts" not in entry else path.parent / entry["rollouts"]
        made = rollouts is None or entry.get("made_update", True)
        if said != [entry["step"], path.parent / entry["path"], rollouts, made, entry.get("entropy")]:
            return f"it says {entry}, not {one}"
    return None


def fuzz(suffix, count, folder):
    permitted = lambda path: entries(path) is not None  # noqa: E731
    counts = run(Format(count, make(suffix), recorded_run, forbidden, permitted, argument="run: "), folder)
    assert min(counts["read"], counts["refused"]) > count / 20


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_lists(folder, suffix):
    fuzz(suffix, 300, folder)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_many_lists(folder, suffix):
    fuzz(suffix, 10_000, folder)
