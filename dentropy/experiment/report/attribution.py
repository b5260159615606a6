"""The section on where the predicted change comes from."""

from __future__ import annotations

from dentropy.experiment.bars import Bar
from dentropy.experiment.drawing import change_unit
from dentropy.experiment.readings import entry_told_apart, part
from dentropy.experiment.report.answer import causal, times
from dentropy.experiment.report.numbers import Unit, with_error
from dentropy.experiment.report.tables import Terms, terms

PARTS = {"pathwise": "pathwise: same contexts", "other_answers": "other answers:\nscore + length correction"}
PARAMETERS = {"by_kind": ("By kind of parameter", "Kind"), "by_layer": ("By layer", "Layer")}
# field: (caption, head, slope that it sums to, what is counted)
BINS = {
    "by_position": ("By position in the answer", "Position", "causal", "tokens"),
    "by_lag": ("By distance from a token to the entropy it changes", "Tokens later", "causal", "pairs"),
    "by_length": ("By length of the answer (tokens)", "Length", "exact", "rollouts"),
}


def attribution(content: dict) -> dict:
    """Where the predicted change comes from: parts, kinds, layers, positions, distances, lengths."""
    step, slope, unit = content["step_size"], causal(content), change_unit(content)
    whole = {entry["estimator"]: entry for entry in content["slope"]}
    found = content.get("attribution") or {}

    def drawn(title: str, head: str, rows: list[Bar], estimator: str = "causal", count: str = "") -> Terms | None:
        entry = whole[estimator]
        stderr, clear = times(entry["stderr"], abs(step)), entry_told_apart(entry)
        return terms(title, rows, unit, head=head, count=count.capitalize(), total_stderr=stderr, clear=clear)

    parts = [(label, part(slope, name)) for name, label in PARTS.items()]
    lists = [drawn("What the slope is made of", "Part", [_bar(label, *ends, step) for label, ends in parts])]
    for key, (title, head) in PARAMETERS.items():
        rows = [_bar(row["name"], row["contribution"], None, step) for row in found.get(key) or []]
        lists.append(drawn(title, head, rows))
    for key, (title, head, estimator, count) in BINS.items():
        rows = [_bar(_range(row), row["contribution"], row["stderr"], step, row[count]) for row in found.get(key) or []]
        lists.append(drawn(title, head, rows, estimator, count))
    why = "has no error bar" if slope["stderr"] is None else "is not told apart from 0"
    return {
        "title": "Where it comes from",
        "unclear": None if entry_told_apart(slope) else why,
        "lists": [each for each in lists if each is not None],
        "horizon": _horizon(content.get("horizon"), step, unit),
    }


def _horizon(found: dict | None, step: float, unit: Unit) -> dict | None:
    """The prediction without what lies far on, and what that leaves out."""
    if found is None:
        return None
    kept, left_out = (
        with_error(times(found[name], step), times(found[error], abs(step)), unit)
        for name, error in (("value", "stderr"), ("left_out", "left_out_stderr"))
    )
    return {"tokens": found["tokens"], "kept": kept, "left_out": left_out, "unit": unit.name}


def _bar(name: str, value: float | None, stderr: float | None, step: float, count: int | None = None) -> Bar:
    return Bar(name, times(value, step), times(stderr, abs(step)), count)


def _range(row: dict) -> str:
    return f"{row['first']:,}" if row["first"] == row["last"] else f"{row['first']:,} to {row['last']:,}"
