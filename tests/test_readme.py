import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_examples_run_and_agree(capsys):
    """The README's blocks, one after the other: the pass through Policy and the loop by torch.func.jvp."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    for column, values in names["base"].columns().items():
        assert values == pytest.approx(getattr(names["sums"], column), rel=1e-3, abs=1e-3), column
    assert "predicted ΔH" in capsys.readouterr().out


def test_setup_is_two_commands():
    assert 'pip install -e ".[probe]" && dentropy demo' in README
    assert 'pip install -e ".[test]" && pytest' in README
