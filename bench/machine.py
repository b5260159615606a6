"""What a recorded run says about where it ran: GPU, versions; no names of machines."""

import platform
from importlib.metadata import PackageNotFoundError, version

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


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
