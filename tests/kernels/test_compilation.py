"""What the interpreter cannot show: that the kernels compile, within the registers and shared memory of a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of a thread without a place in registers: some dozens cost little, kilobytes are a tile too large.
STACK = 512
TENSOR_MEMORY = 512  # columns of it, where there is any
# Every call on one architecture takes two minutes. These always run: each kernel in its largest form where shared
# memory is least, and what has instructions of its own on sm_90.
LARGEST = {
    86: (
        "logits, softcap",
        "head, bias and softcap",
        "shards",
        "sums",
        "attention, 128, torch.bfloat16, window, softcap, sinks",
    ),
    90: ("head, moving",),
}
KERNELS = 7
# Their tiles leave at most a pointer without a register: it is stored before the first product and read after the last.
HEADS = ("head, primal", "head, fixed", "head, moving", "head, moving alone", "head, bias and softcap")
CASES = [
    pytest.param(86, LARGEST[86], KERNELS, id="86-largest"),
    pytest.param(90, LARGEST[90], 2, id="90-largest"),
    *[pytest.param(a, (), KERNELS, id=str(a), marks=pytest.mark.slow) for a in (80, 86, 89, 90, 100, 120)],
]


def compiled_kernels(architecture: int, names: tuple[str, ...], cache: Path) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    outcome = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_offline.py"), str(architecture), *names],
        capture_output=True,
        text=True,
        env=environment | dict(TRITON_CACHE_DIR=str(cache)),
    )
    assert outcome.returncode == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


@pytest.mark.parametrize("architecture, names, kernels", CASES)
def test_every_kernel_fits(architecture, names, kernels, tmp_path):
    found = compiled_kernels(architecture, names, tmp_path)
    assert {kernel["call"] for kernel in found} >= set(names)
    assert len({kernel["kernel"] for kernel in found}) == kernels
    for kernel in found:
        assert kernel["shared"] <= kernel["most_shared"] and kernel["tensor_memory"] <= TENSOR_MEMORY, kernel
        assert kernel["stack"] <= STACK, kernel
        if architecture < 90 and kernel["call"] in HEADS:
            assert kernel["spills_in_loops"] == 0, kernel
        multiplies = kernel["kernel"] == "_linear_states_kernel" or (
            "attention" in kernel["kernel"] and "float32" not in kernel["call"]
        )
        assert (kernel["products"] > 0) == multiplies, kernel
