import doctest
import importlib

import pytest

MODULES = ["batch", "direction", "policy", "probe"]  # the others' examples run beside their own tests


@pytest.mark.parametrize("name", MODULES)
def test_examples_run_as_written(name):
    found = doctest.testmod(importlib.import_module(f"dentropy.{name}"))
    assert found.attempted > 0 and found.failed == 0
