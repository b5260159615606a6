"""The notebook among the examples runs as it is but for the number of rollouts, and is kept without what it printed."""

import json
import tomllib
from pathlib import Path

import pytest

import dentropy

NOTEBOOK = Path(dentropy.__file__).parent / "examples" / "why_entropy_moved.ipynb"
FEWER = "PROMPTS, PER_PROMPT, STEP_SIZE = 8, 4, 1e-4"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_its_cells_run_in_order(cells, capsys):
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            settings = "parameters" in cell["metadata"].get("tags", [])
            exec(compile(FEWER if settings else "".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    assert names["result"].batch.n_groups <= 8 and len(names["result"].changes) == 3
    assert names["table"].share.sum() == pytest.approx(names["result"].update.tokens)
    assert names["table"].n.sum() == names["makers"].n_tokens
    printed = capsys.readouterr().out
    assert printed.count("reward") == 3 and printed.count("nats per token per unit of η") == 4
    for shown in ("judges", "direction", "result"):
        assert repr(names[shown]).startswith("<")
    assert repr(names["result"].update).startswith("<UpdateAttribution") and repr(names["result"].forecast)


def test_it_is_kept_without_output_and_comes_with_the_package(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    root = Path(__file__).parents[1]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert any(NOTEBOOK.match(pattern) for pattern in data["dentropy.examples"])
    assert "dentropy/examples/why_entropy_moved.ipynb" in (root / "README.md").read_text()
