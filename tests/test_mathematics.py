"""mathematics.md names what there is, and leaves no estimator out."""

import ast
import re
from inspect import isfunction
from pathlib import Path
from pkgutil import resolve_name

import pytest

import dentropy
from dentropy import estimators

TEXT = Path(dentropy.__file__).with_name("mathematics.md").read_text(encoding="utf-8")
ROOT = Path(__file__).parents[1]
NAMES = sorted(set(re.findall(r"`(dentropy(?:\.\w+)+)`", TEXT)))
TESTS = sorted(set(re.findall(r"`(tests/[^`]*)`", TEXT)))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_of_something_that_computes(name):
    found = resolve_name(name)
    assert callable(found) or isinstance(found, property)


@pytest.mark.parametrize("test", TESTS)
def test_a_test_is_there(test):
    path, *names = test.split("::")
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    assert names and names[-1].startswith("test_")
    for name in names:
        (found,) = (node for node in body if getattr(node, "name", None) == name)
        body = found.body


def test_every_estimator_and_every_section_is_accounted_for():
    functions = {
        f"{f.__module__}.{f.__name__}" for f in map(estimators.__dict__.get, estimators.__all__) if isfunction(f)
    }
    assert functions and functions <= set(NAMES)
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        assert re.search("`dentropy", section) and re.search("`tests/", section), section.splitlines()[0]
