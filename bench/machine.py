"""What a recorded run says about where it ran: GPU, versions; no names of machines."""

import os
import platform
import subprocess
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


def recorded() -> dict:
    """`machine` with processor and commit, for records that pytest-benchmark does not make."""
    said = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in said if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    where = {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()}
    return machine() | where | {"commit": commit or None, "with_changes": bool(changed)}


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
