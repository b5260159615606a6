"""Compiles every kernel for six architectures, without a GPU, and writes what each takes (compiled_kernels.md).

python bench/compiled_kernels.py
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import triton

HERE = Path(__file__).parent
COMPILE = HERE.parent / "tests" / "kernels" / "compile_offline.py"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def compiled(architecture: int) -> dict[tuple[str, str], dict]:
    """{(call, kernel): what it takes}."""
    said = subprocess.run([sys.executable, COMPILE, str(architecture)], check=True, stdout=subprocess.PIPE, text=True)
    found = map(json.loads, said.stdout.splitlines())
    return {(kernel["call"], kernel["kernel"].strip("_").removesuffix("_kernel")): kernel for kernel in found}


def table(found: dict[int, dict[tuple[str, str], dict]]) -> list[str]:
    most = [next(iter(of_one.values()))["most_shared"] // 1024 for of_one in found.values()]
    lines = ["| call | kernel |" + "".join(f" sm_{a} ({kib} KiB) |" for a, kib in zip(found, most))]
    lines.append("|---|---|" + "---|" * len(found))
    for call, kernel in next(iter(found.values())):
        cells = [
            f"{taken['registers']} / {taken['stack']} / {taken['shared'] / 1024:.1f}"
            for taken in (of_one[call, kernel] for of_one in found.values())
        ]
        lines.append(f"| {' | '.join([call, kernel, *cells])} |")
    return lines


def main() -> None:
    found = {architecture: compiled(architecture) for architecture in ARCHITECTURES}
    text = [
        "# What the compiled kernels take",
        "",
        f"Triton {triton.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}; no GPU. In",
        "each cell: registers of a thread / bytes of a thread that found no place in them / KiB of shared memory of a",
        "program, beside the most that the architecture gives one. Made by `python bench/compiled_kernels.py`.",
        "",
        *table(found),
    ]
    (HERE / "results" / "compiled_kernels.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
