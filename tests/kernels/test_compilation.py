"""What the interpreter cannot show: that the kernels compile, within the registers and shared memory of a GPU."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# Bytes of a thread without a place in registers: some dozens cost little, kilobytes are a tile too large.
STACK = 512
TENSOR_MEMORY = 512  # columns of it, where there is any
# Every architecture takes a minute or two: one with the least shared memory, one with instructions of its own.
ALWAYS = (86, 90)
ARCHITECTURES = [
    pytest.param(architecture, marks=[] if architecture in ALWAYS else pytest.mark.slow)
    for architecture in (80, 86, 89, 90, 100, 120)
]


def compiled_kernels(architecture: int, cache: Path) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    outcome = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_offline.py"), str(architecture)],
        capture_output=True,
        text=True,
        env=environment | dict(TRITON_CACHE_DIR=str(cache)),
    )
    assert outcome.returncode == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """{architecture: what its kernels take, to come}: all that this run asks for, side by side."""
    chosen = {item.callspec.params["architecture"] for item in request.session.items if item.path == request.path}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {a: pool.submit(compiled_kernels, a, tmp_path_factory.mktemp(f"sm_{a}")) for a in sorted(chosen)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits(compiled, architecture):
    found = compiled[architecture].result()
    assert len({kernel["kernel"] for kernel in found}) == 7
    for kernel in found:
        assert kernel["shared"] <= kernel["most_shared"] and kernel["tensor_memory"] <= TENSOR_MEMORY, kernel
        assert kernel["stack"] <= STACK, kernel
        multiplies = kernel["kernel"] == "_linear_states_kernel" or (
            "attention" in kernel["kernel"] and "float32" not in kernel["call"]
        )
        assert (kernel["products"] > 0) == multiplies, kernel
