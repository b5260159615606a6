"""The lines that make a number right are each guarded: a mutant of any of them must fail the tests named beside it.

Every mutant is made in a copy of the tree, never in place.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parents[1]
WORKERS = os.cpu_count()


def test_every_line_is_there():
    """So that a change of one shows at once, not in the slow run."""
    assert len(MUTANTS) >= 40
    for file, old, new, _ in MUTANTS:
        assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1 and new != old, (file, old)


def copy_of_the_tree(folder: Path) -> Path:
    """The packages and tests under `folder`, kernels where they are installed, so that it imports as it stands."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("dentropy", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "dentropy" / "kernels", ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def survives(tree: Path, file: str, old: str, new: str, tests: str) -> str | None:
    """None where the tests fail on the mutant as they should, else what went on instead."""
    path = tree / (f"dentropy/{file}" if file.startswith("kernels/") else file)
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        return f"{file}: {old!r} stands there {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")
    try:
        outcome = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests.split()],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
    finally:
        path.write_text(text, encoding="utf-8")
    if outcome.returncode == 1 and " failed" in outcome.stdout:
        return None
    return f"{file}: {new!r} survives {tests} (exit code {outcome.returncode})\n{outcome.stdout[-500:]}"


@pytest.mark.slow
def test_every_mutant_dies(tmp_path):
    trees = [copy_of_the_tree(tmp_path / str(worker)) for worker in range(WORKERS)]

    def share(worker: int) -> list[str | None]:
        return [survives(trees[worker], *mutant) for mutant in MUTANTS[worker::WORKERS]]

    with ThreadPoolExecutor(WORKERS) as pool:
        said = [line for lines in pool.map(share, range(WORKERS)) for line in lines if line is not None]
    assert not said, "\n".join(said)
