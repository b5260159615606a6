"""Which package may import which, and that every name leads to one thing."""

import ast
import importlib
import pkgutil
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import dentropy

ROOT = Path(dentropy.__file__).parents[1]
# What each may import beside itself, whether at once or inside a function.
MAY_IMPORT = {
    "doors": set(),
    "shown": set(),
    "large": set(),
    "kernels": set(),
    "stats": {"shown", "kernels"},
    "reference": {"stats"},
    "rollouts": {"doors", "large", "shown"},
    "model": {"doors", "shown", "stats", "kernels"},
    "estimators": {"large", "shown", "stats"},
    "passes": {"doors", "large", "shown", "model", "rollouts", "estimators", "stats"},
    "experiment": {"doors", "shown", "passes", "model", "rollouts", "estimators", "stats"},
    "integrations": {"doors", "experiment", "passes", "model", "rollouts", "estimators", "stats"},
    "demo": {"experiment", "passes", "model", "rollouts", "estimators", "stats"},
    "examples": {"demo", "integrations", "experiment"},
    "cli": {"doors", "demo", "experiment", "passes", "model", "rollouts", "estimators", "stats"},
    "__main__": {"cli"},
}


def files() -> list[tuple[str, Path]]:
    """(package or module below `dentropy`, file) for every source file but `dentropy/__init__.py`."""
    found = [("kernels", path) for path in (ROOT / "kernels").rglob("*.py")]
    for path in (ROOT / "dentropy").rglob("*.py"):
        first = path.relative_to(ROOT / "dentropy").parts[0].removesuffix(".py")
        if first != "__init__":
            found.append((first, path))
    return found


def imported(path: Path) -> set[str]:
    """The packages and modules below `dentropy` that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent.name == "kernels", f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names if node.level == 0]
    return {name.split(".")[1] for name in names if name.startswith("dentropy.")} - {"__version__"}


def test_arrows_run_one_way():
    for package, path in files():
        assert imported(path) <= MAY_IMPORT[package] | {package}, path


def test_no_module_imports_what_imports_it():
    """Not even for its types, or inside a function."""
    folder, graph = ROOT / "dentropy", {}
    for path in folder.rglob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = found
    packages = {name for name in graph if (ROOT / Path(*name.split("."))).is_dir()} - {"dentropy.estimators"}
    inside = {name: imported & set(graph) - packages - {name} for name, imported in graph.items()}
    assert sum(map(len, inside.values())) > 200
    TopologicalSorter(inside).prepare()  # raises where there is a circle


def test_the_experimental_room_has_one_door():
    for package, path in files():
        uses = "compiled_layers" in path.read_text(encoding="utf-8").replace("`compiled_layers`", "")
        assert not uses or path.name == "policy.py" or path.parent.name == "compiled_layers", (package, path)


@pytest.mark.parametrize("package", [None, *sorted(MAY_IMPORT)])
def test_no_module_is_hidden_by_something_of_its_name(package):
    whole = importlib.import_module("dentropy" + (f".{package}" if package else ""))
    for module in pkgutil.walk_packages(getattr(whole, "__path__", []), whole.__name__ + "."):
        importlib.import_module(module.name)
        holder, _, name = module.name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(holder), name), ModuleType), module.name


def test_public_names_are_there():
    for name in dentropy.__all__:
        assert getattr(dentropy, name) is not None


def test_every_package_is_installed_and_says_what_lives_there():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "dentropy").rglob("__init__.py")}
    assert set(listed) == {".".join(folder.parts) for folder in folders} | {"dentropy.kernels"}
    for name in listed:
        assert importlib.import_module(name).__doc__, name
