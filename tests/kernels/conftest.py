"""The kernels run natively where there is a GPU and through Triton's interpreter where there is none."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

INTERPRETED = not torch.cuda.is_available()

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # a platform that Triton has no build for


def interpreter_fails() -> bool:
    """The interpreter of Triton 3.6 cannot run loops with NumPy 2.4; Triton 3.7 can."""
    import triton

    return triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def kernels_in_use(request, monkeypatch):
    """Where there is no GPU: dispatch to the kernels, with tiles so small that few logits make many."""
    if INTERPRETED:
        from dentropy.kernels import token_stats

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        for name, size in dict(BLOCK=64, LANES=8, SEGMENT=128).items():
            monkeypatch.setattr(token_stats, name, size)
        interpreted = request.path.name != "test_compilation.py" and "[reference" not in request.node.name
        if interpreted and interpreter_fails():
            pytest.skip("the interpreter of Triton 3.6 cannot run loops with NumPy 2.4; Triton 3.7 can")
