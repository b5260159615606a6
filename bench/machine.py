"""What a recorded run says about where it ran: GPU, versions; no names of machines."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy")


def machine() -> dict:
    return dict(
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cuda=torch.version.cuda,
        system=platform.system(),
        python=platform.python_version(),
        **{name: found for name in PACKAGES if (found := version_of(name)) is not None},
    )


def record() -> dict:
    """What pytest-benchmark writes, for other records: `machine` with the processor, the load, date and commit."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()  # noqa: E731
    cpus = Path("/proc/cpuinfo")
    names = [line for line in cpus.read_text().splitlines() if line.startswith("model name")] if cpus.exists() else []
    cpu = names[0].partition(": ")[2] if names else platform.processor()
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return dict(
        machine_info=dict(cpu=cpu, cores=os.cpu_count(), load=load, **machine()),
        commit_info=dict(id=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "--untracked-files=no"))),
        datetime=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
