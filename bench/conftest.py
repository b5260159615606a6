"""What a recorded run says about where it ran: processor, GPU, versions, commit; no names of machines."""

import platform
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks import `interleaved`

PACKAGES = ("torch", "triton", "transformers", "numpy")


def pytest_benchmark_update_machine_info(config, machine_info):
    cpu = machine_info["cpu"]
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw"),
        cores=cpu.get("count"),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cuda=torch.version.cuda,
        system=platform.system(),
        python=platform.python_version(),
        **{name: version(name) for name in PACKAGES if find_spec(name)},
    )


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in set(commit_info) - {"id", "dirty"}:
        del commit_info[name]
