"""The section on where the predicted change comes from."""

from __future__ import annotations

from dentropy.experiment.readings import entry_told_apart, part
from dentropy.experiment.report.answer import causal, times
from dentropy.experiment.report.numbers import unit_for, with_error
from dentropy.experiment.report.sections import NATS, section
from dentropy.experiment.report.tables import Bar, bars
from dentropy.experiment.report.tags import Markup, tag

PARTS = {"pathwise": "pathwise: same contexts", "other_answers": "other answers: score + length correction"}
PARAMETERS = {"by_kind": ("By kind of parameter", "Kind"), "by_layer": ("By layer", "Layer")}
# field: (caption, head, slope that it sums to, what is counted)
BINS = {
    "by_position": ("By position in the answer", "Position", "causal", "tokens"),
    "by_lag": ("By distance from a token to the entropy it changes", "Tokens later", "causal", "pairs"),
    "by_length": ("By length of the answer (tokens)", "Length", "exact", "rollouts"),
}
NOTE = (
    "What each adds to the predicted change of the update itself, with a whisker of 2 standard errors where there is "
    "an error bar. The shares of parameters have none: one gradient gives them all, summed over rollouts, and an error "
    "bar would cost a pass with tangents per layer. Grey is not told apart from 0. "
    "Every list adds up to the whole; that by length to the exact slope's prediction, which alone can be split so."
)
UNCLEAR = "The predicted change as a whole {}, so where it comes from is not known either: all its parts are grey."


def attribution(content: dict) -> Markup | None:
    """Where the predicted change comes from: parts, kinds, layers, positions, distances, lengths."""
    step, slope = content["step_size"], causal(content)
    whole = {entry["estimator"]: entry for entry in content["slope"]}
    found = content.get("attribution") or {}
    why = "has no error bar" if slope["stderr"] is None else "is not told apart from 0"

    def drawn(title: str, head: str, rows: list[Bar], estimator: str = "causal", count: str | None = None):
        if not rows:
            return None
        entry = whole[estimator]
        return bars(
            title,
            rows,
            unit_for([row.value for row in rows], NATS),
            head=head,
            count=count and count.capitalize(),
            total_stderr=times(entry["stderr"], abs(step)),
            clear=entry_told_apart(entry),
        )

    parts = [(label, part(slope, name)) for name, label in PARTS.items()]
    lists = [drawn("What the slope is made of", "Part", [_bar(label, *ends, step) for label, ends in parts])]
    for key, (title, head) in PARAMETERS.items():
        rows = [_bar(row["name"], row["contribution"], None, step) for row in found.get(key) or []]
        lists.append(drawn(title, head, rows))
    for key, (title, head, estimator, count) in BINS.items():
        rows = [_bar(_range(row), row["contribution"], row["stderr"], step, row[count]) for row in found.get(key) or []]
        lists.append(drawn(title, head, rows, estimator, count))
    return section(
        "attribution",
        "Where it comes from",
        None if entry_told_apart(slope) else tag("p", UNCLEAR.format(why)),
        tag("p", NOTE, class_="note"),
        tag("div", lists, class_="grid"),
        _horizon(content.get("horizon"), step),
    )


def _horizon(found: dict | None, step: float) -> Markup | None:
    """The prediction without what lies far on, and what that leaves out."""
    if found is None:
        return None
    both = [times(found[name], step) for name in ("value", "left_out")]
    errors = [times(found[name], abs(step)) for name in ("stderr", "left_out_stderr")]
    unit = unit_for(both, NATS)
    kept, left_out = (with_error(value, error, unit) for value, error in zip(both, errors, strict=True))
    return tag(
        "p",
        f"With no more than {found['tokens']} tokens from a token to the entropy it changes, the prediction is ",
        kept,
        "; that leaves out ",
        left_out,
        f" ({unit.name}).",
    )


def _bar(name: str, value: float | None, stderr: float | None, step: float, count: int | None = None) -> Bar:
    return Bar(name, times(value, step), times(stderr, abs(step)), count)


def _range(row: dict) -> str:
    return f"{row['first']:,}" if row["first"] == row["last"] else f"{row['first']:,} to {row['last']:,}"
