"""results.json, as `dentropy show` reads it."""

import json
from pathlib import Path

import pytest
from harness import Format, run
from mangling import as_json, mangled, mangled_bytes

from dentropy.experiment.run_folder import load
from dentropy.experiment.summary import summary

GOOD = json.loads((Path(__file__).parents[1] / "experiment" / "schema_1" / "results.json").read_text())
# Fields that may be null, by results.md; every other null is a number that `not_finite` names.
NULLABLE = {
    *("triton", "transformers", "base_entropy_stderr", "curvature", "trust", "fresh_check", "stderr", "stderr_reason"),
    *("jackknife_stderr", "interval", "smoothed_delta", "predicted_linear_stderr", "predicted_quadratic"),
    *("predicted_quadratic_stderr", "prediction_error_stderr", "w", "wT", "wH", "khat_reason", "khat_threshold"),
    *("linear_until", "by_layer", "by_kind", "parameters", "difference_stderr", "logp_plus_entropy", "dlogp", "z"),
    *("step", "dentropy", "torch", "numpy", "python", "platform"),
}
NEVER_NEGATIVE = ("stderr", "ess", "n_", "noise_floor", "temperature", "step_size", "max_weight", "rollouts", "tokens")
OPEN = ("versions", "source", "seeds", "contributions")  # names of the user's
OPTIONAL = ("not_finite",)


def make(folder, random):
    path = folder / "results.json"
    data = mangled_bytes(as_json(GOOD), random) if random.random() < 0.25 else as_json(mangled(GOOD, random))
    path.write_bytes(data)
    return path


def read(path):
    content = load(path.parent)
    assert summary(content)
    return content


def forbidden(path, content):
    not_finite = content.get("not_finite", {})
    if not isinstance(not_finite, dict) or not set(not_finite.values()) <= {"inf", "-inf", "nan"}:
        return f"not_finite is {not_finite!r:.100}"
    return differs(GOOD, content, "", not_finite)


def differs(good, found, path, not_finite):
    """Where the content is not of the form of a good one."""
    name = path.rpartition(".")[2]
    if found is None:
        return None if good is None or name in NULLABLE or path in not_finite else f"{path} is null"
    if isinstance(good, bool) or isinstance(found, bool):
        return None if type(good) is type(found) else f"{path} is {found!r}"
    if isinstance(good, (int, float)):
        return number(found, path, name)
    if good is None:
        return None
    if type(good) is not type(found):
        return f"{path} is {found!r:.60}"
    if isinstance(good, dict):
        missing = set() if name in OPEN else set(good) - set(found) - set(OPTIONAL)
        return (
            f"{path} lacks {missing}"
            if missing
            else first(
                differs(good[key], found[key], f"{path}.{key}".lstrip("."), not_finite) for key in good if key in found
            )
        )
    if isinstance(good, list) and good:
        return first(differs(good[0], item, f"{path}.{i}", not_finite) for i, item in enumerate(found))
    return None


def number(found, path, name):
    if not isinstance(found, (int, float)) or not abs(found) <= 1.8e308:
        return f"{path} is {found!r:.60}"
    if found < 0 and name.startswith(NEVER_NEGATIVE):
        return f"{path} is {found}"
    return None


def first(found):
    return next((why for why in found if why is not None), None)


@pytest.mark.parametrize("count", [400, pytest.param(1200, marks=pytest.mark.slow)])
def test_results(folder, count):
    counts = run(Format(count, make, read, forbidden), folder)
    assert min(counts["read"], counts["refused"]) > count / 15
