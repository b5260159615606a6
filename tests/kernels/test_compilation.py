"""What the interpreter cannot show: that the kernels compile, for an H100, within its registers and shared memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

SHARED = 227 * 1024  # bytes that a program on an H100 can have
# Bytes of a thread without a place in registers: some dozens cost little, kilobytes are a tile too large.
STACK = 512


def test_every_kernel_fits_a_hopper_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    outcome = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment | dict(TRITON_CACHE_DIR=str(tmp_path))
    )
    assert outcome.returncode == 0, outcome.stderr
    kernels = re.findall(
        r"(.+): (\w+): (\d+) registers, (\d+) bytes of stack, (\d+) bytes shared, (\d+) wgmma", outcome.stdout
    )
    assert len({kernel for _, kernel, *_ in kernels}) == 7
    for name, kernel, _, stack, shared, products in kernels:
        assert int(stack) <= STACK and int(shared) <= SHARED, (name, kernel)
        multiplies = kernel not in ("_token_states_kernel", "_stats_kernel", "_merge_kernel", "_sequence_sums_kernel")
        assert (int(products) > 0) == (multiplies and "float32" not in name), (name, kernel)
