"""What PyTorch says of memory: how much is left, and which errors mean that there was too little."""

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that PyTorch can still hand out on a CUDA device: the driver's, and those it keeps for itself."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def is_out_of_memory(error: BaseException) -> bool:
    """On CUDA it has a class of its own; on a CPU only the allocator's words tell it from other errors. Triton's, for a
    kernel that asks for more than a multiprocessor has, is known by its name: Triton need not be installed."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "DefaultCPUAllocator: " in str(error)
        or type(error).__name__ == "OutOfResources"
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes that a new tensor on the device can count on; None where nothing tells."""
    if device.type == "cuda":
        return free_memory(device)
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None
