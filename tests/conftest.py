"""Set up before any test module is imported."""

import gc
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

import pytest
import torch
from interpreter import patch_at_launches_only

# Models here are tiny: threads that wait for each other cost more than they compute.
torch.set_num_threads(1)

if find_spec("triton") is not None and not torch.cuda.is_available():
    # Triton settles between compiling and interpreting while it and the kernels' modules are imported, so this comes
    # first. Dispatch looks at the variable too: it is set again for the tests of the kernels only (tests/kernels),
    # and the others see dentropy as users do.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in iter_modules(find_spec("dentropy.kernels").submodule_search_locations):
            import_module(f"dentropy.kernels.{module.name}")
    patch_at_launches_only()


def pytest_collection_finish():
    """What is imported stays: no collection of garbage need walk through it again, which would take seconds each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()
