"""The door to results.json: one line that names the file and the field."""

import json
from pathlib import Path

import pytest

from dentropy.doors import is_refusal
from dentropy.experiment.results_schema import check
from dentropy.experiment.run_folder import load

SAVED = Path(__file__).with_name("schema_1")


@pytest.fixture
def content():
    return json.loads((SAVED / "results.json").read_text())


def test_what_was_saved_before_and_now_is_read(content, run):
    check(content, "results.json")
    assert load(SAVED) == content
    assert load(run)["schema_version"] == 3


def test_fields_of_later_versions_are_left_alone(content):
    content["measured"][0]["new"] = content["new"] = {"anything": [None, "x"]}
    check(content, "results.json")


@pytest.mark.parametrize(
    "field, value, message",
    [
        (("measured", 0, "eta"), "x", "measured.0.eta: 'x', expected type \"number\""),
        (("measured", 0, "ess_fraction"), 300, "measured.0.ess_fraction: 300, expected maximum"),
        (("measured", 0, "verdict"), "fine", "measured.0.verdict: 'fine', expected enum"),
        (("measured",), [], "measured: \\[\\], expected minItems 1"),
        (("slope",), [], "slope: \\[\\], expected minItems 3"),
        (("slope", 0, "stderr"), -1, "slope.0.stderr: -1, expected minimum 0"),
        (("n_tokens",), True, "n_tokens: True, expected type"),
        (("n_tokens",), 10**400, "n_tokens: an integer of 1329 bits"),
        (("base_entropy",), float("nan"), "base_entropy: nan, expected a finite number"),
        (("base_entropy",), None, "base_entropy: None, expected type"),
        (("trust",), None, "trust: None, expected type"),
        (("source",), {"policy": 1}, "source.policy: 1, expected type"),
        (("fresh_check", "eta"), 7.0, "fresh_check.eta: 7, expected one of those in measured"),
        (("not_finite",), {"nowhere": "inf"}, "not_finite: 'nowhere', expected paths of null numbers"),
        (("not_finite",), {"measured.0.eta": "inf"}, "not_finite"),
        (("audit",), "fine", "audit: 'fine', expected type"),
    ],
)
def test_what_the_schema_forbids_names_the_field(content, field, value, message):
    holder = content
    for key in field[:-1]:
        holder = holder[key]
    holder[field[-1]] = value
    with pytest.raises(ValueError, match=f"^results.json: {message}") as error:
        check(content, "results.json")
    assert is_refusal(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["measured", "slope", "audit", "source", "n_groups", "noise_floor"])
def test_a_missing_field_is_named(content, name):
    del content[name]
    with pytest.raises(ValueError, match=f"'{name}' is a required property"):
        check(content, "results.json")


def test_a_number_that_is_not_finite_is_null_and_named(content):
    content["trust"]["eta_star"] = None
    with pytest.raises(ValueError, match="trust.eta_star: None, expected type"):
        check(content, "results.json")
    content["not_finite"] = {"trust.eta_star": "inf"}
    check(content, "results.json")


@pytest.mark.parametrize("text", ['{"schema_version": true}', '{"schema_version": "1"}', "1", "[" * 100_000, "\xff"])
def test_files_of_another_kind_are_one_line(tmp_path, text):
    (tmp_path / "results.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"results\.json: ") as error:
        load(tmp_path)
    assert is_refusal(error.value) and "\n" not in str(error.value)
