"""The example runs on TRL, and its plot is drawn from what was recorded."""

import pytest

from dentropy.examples import grpo


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`:FutureWarning")
def test_a_short_run_is_drawn(tmp_path):
    entries = grpo.train(tmp_path, steps=1)
    assert [entry["step"] for entry in entries] == [1]
    grpo.plot(entries, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
