"""What a recorded run says about where it ran: processor, GPU, versions, commit; no names of machines."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks import `interleaved`

from machine import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    cpu = machine_info["cpu"]
    machine_info.clear()
    machine_info.update(cpu=cpu.get("brand_raw"), cores=cpu.get("count"), **machine())


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in set(commit_info) - {"id", "dirty"}:
        del commit_info[name]
