"""What a run warns of: each warning once, with the numbers that it is about."""

from __future__ import annotations

import math

# So many names stand beside a warning; the others are counted.
NAMED = 3


def warned(content: dict) -> list[str]:
    """All warnings of the run."""
    return _said(_named(content))


def of_the_answer(content: dict) -> list[str]:
    """Those about what the page answers: the run as a whole, ΔH at the step, and the slope that predicts it."""
    at_step = [_change(row) for row in content["measured"] if math.isclose(row["eta"], content["step_size"])]
    return _said([(name, text) for name, text in _named(content) if name in ("", "causal slope", *at_step)])


def _named(content: dict) -> list[tuple[str, str]]:
    """(what it is about, warning); of the run as a whole it is about nothing by name."""
    entries = [(f"{row['estimator']} slope", row) for row in content["slope"]]
    entries += [("curvature", content.get("curvature")), ("η*", content.get("trust"))]
    entries += [(_change(row), row) for row in content["measured"]]
    for entry in (content.get("forecast") or {}).get("pass_at_k") or []:
        entries.append((f"slope of pass@{entry['k']}", entry["slope"]))
    found = [("", text) for text in content["audit"]["warnings"]]
    found += [(name, text) for name, row in entries for text in (row or {}).get("warnings") or []]
    return found + [("numbers", f"{path} is {value}") for path, value in (content.get("not_finite") or {}).items()]


def _change(row: dict) -> str:
    return f"ΔH at η = {row['eta']:.3g}"


def _said(named: list[tuple[str, str]]) -> list[str]:
    about: dict[str, list[str]] = {}
    for name, text in named:
        if name not in about.setdefault(text, []):
            about[text].append(name)
    return [_sentence(text, names) for text, names in about.items()]


def _sentence(text: str, names: list[str]) -> str:
    if names in ([""], ["numbers"]):
        return text
    if len(names) == 1:
        return f"{names[0]}: {text}"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{text} ({len(names)} times: {', '.join(names[:NAMED])}{more})"
