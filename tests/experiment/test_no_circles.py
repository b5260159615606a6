"""No module of the experiment imports, even for its types or inside a function, what imports it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import dentropy

FOLDER = Path(dentropy.__file__).parent / "experiment"


def test_imports_run_one_way():
    graph = {}
    for path in FOLDER.rglob("*.py"):
        name = ".".join(["dentropy", *path.relative_to(FOLDER.parent).with_suffix("").parts])
        graph[name.removesuffix(".__init__")] = found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {name: imported & set(graph) - {"dentropy.experiment", name} for name, imported in graph.items()}
    assert sum(map(len, inside.values())) > 20
    TopologicalSorter(inside).prepare()  # raises where there is a circle
