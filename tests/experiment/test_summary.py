from pathlib import Path

import pytest

from dentropy.experiment.run_folder import load
from dentropy.experiment.summary import summary

SAVED = Path(__file__).with_name("schema_1")


def test_a_saved_run_has_the_summary_it_had(run, result):
    assert summary(load(run)) == result.summary()


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_of_before_reads_as_before(version):
    """results.json as its version of the schema was written, and what `show` printed of it then.

    1 is the demo of version 0.1.0, its lists cut short;
    2 is a small run, whose line on the cost has other words by now.
    """
    saved = SAVED.with_name(f"schema_{version}")
    content = load(saved)
    assert content["schema_version"] == version
    assert summary(content) == (saved / "summary.txt").read_text(encoding="utf-8").rstrip("\n")


def test_the_schema_is_that_of_before(result):
    """Every field of then is there, with a value of the same kind; a new one may have come."""

    def kept(before, now, path):
        if before is None or now is None:
            return
        assert isinstance(now, (int, float) if isinstance(before, (int, float)) else type(before)), path
        if isinstance(before, dict) and path not in ("source", "seeds", "versions", "audit.contributions"):
            for name, value in before.items():
                assert name in now, f"{path}.{name}"
                kept(value, now[name], f"{path}.{name}".lstrip("."))
        if isinstance(before, list) and before and now:
            kept(before[0], now[0], path)

    kept(load(SAVED), result.content, "")
