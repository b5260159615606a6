"""The answer in words: what the update does to the entropy, and by which way."""

from __future__ import annotations

import math

from dentropy.experiment.report.numbers import plain, step_text
from dentropy.experiment.report.tags import Markup, tag

UNIT = "nats per token"


def at_step(content: dict) -> dict | None:
    """The entry of `measured` at the update itself, or None."""
    step = content["step_size"]
    return next((m for m in content["measured"] if math.isclose(m["eta"], step, rel_tol=1e-9)), None)


def causal(content: dict) -> dict:
    """The slope that predicts."""
    return next(entry for entry in content["slope"] if entry["estimator"] == "causal")


def answer(content: dict) -> str:
    """One sentence: the measured change at the step size; the predicted one where no measurement stands."""
    entry, slope, step = at_step(content), causal(content), content["step_size"]
    doubt = _doubt(entry)
    if doubt is None:
        value, stderr, reason = entry["delta"], entry["stderr"], entry.get("stderr_reason")
        interval, source = entry.get("interval"), "measured"
    else:
        value, stderr, reason = _times(slope["value"], step), _times(slope["stderr"], abs(step)), None
        interval, source = None, f"predicted; {doubt}"
    where = f"at step size {step_text(step)}"
    if value is None:
        return f"What this update does to entropy {where} is not known: {doubt}, and no finite prediction."
    if stderr is None:
        missing = f", no error bar: {reason}" if reason else ", no error bar"
        return f"This update {_verb(value)} entropy by {plain(abs(value))} {UNIT} {where} ({source}{missing})."
    if not resolved(value, stderr, interval):
        return (
            f"This update does not change entropy by an amount that can be told from zero {where}: "
            f"{plain(value, stderr)} {UNIT} ({source})."
        )
    return f"This update {_verb(value)} entropy by {plain(abs(value), stderr)} {UNIT} {where} ({source})."


def comparison(content: dict) -> list[Markup]:
    """Predicted, measured and uncorrected change at the step size, as terms with their values."""
    entry, slope, step = at_step(content), causal(content), content["step_size"]
    rows = [("Predicted before the step", _times(slope["value"], step), _times(slope["stderr"], abs(step)))]
    if entry is not None:
        rows.append(("Measured by importance sampling", entry["delta"], entry["stderr"]))
    rows.append(("What a loop without the length correction reports", _times(slope["uncorrected"], step), None))
    return [
        tag("div", tag("dt", name), tag("dd", _change(value, stderr), " ", tag("small", UNIT)))
        for name, value, stderr in rows
    ]


def ways(content: dict) -> str | None:
    """How the predicted change comes about: in the same contexts, or through other answers.

    pathwise is what the next-token distributions change at the contexts that were visited; score and
    length_correction together are what other answers change. They are not split further: longer answers of
    average entropy add to both and change nothing. The change of mean length itself follows exactly, to first
    order: −length_correction / H̄, relative. Shares are given only where the two have one sign and the slope
    is told from zero; else the amounts.
    """
    slope, step = causal(content), content["step_size"]
    parts = [slope[name] for name in ("pathwise", "score", "length_correction")]
    if None in parts or slope["value"] is None:
        return None
    same, other = parts[0] * step, (parts[1] + parts[2]) * step
    length = _length_words(content, parts[2])
    if same * other > 0 and resolved(slope["value"], slope["stderr"], slope.get("interval")):
        share = other / (same + other)
        return (
            f"Of the predicted change, {share:.0%} comes through other answers{length} and {1 - share:.0%} "
            "from next-token distributions that change in the same contexts."
        )
    note = " The two have opposite signs: neither is a share of the whole." if same * other < 0 else ""
    stderr = _times(slope["stderr"], abs(step))
    amounts = [("+" if part > 0 else "") + plain(part, stderr, error=False) for part in (same, other)]
    return (
        f"The predicted change is {amounts[0]} {UNIT} from next-token distributions that change in the same "
        f"contexts, and {amounts[1]} through other answers{length}.{note}"
    )


def resolved(value: float, stderr: float | None, interval: list | None) -> bool:
    """Is the value told from zero by its 95% interval (2 standard errors where there is none)?"""
    if interval is not None and None not in interval:
        return not interval[0] <= 0 <= interval[1]
    return stderr is not None and abs(value) > 2 * stderr


def _doubt(entry: dict | None) -> str | None:
    """Why the measurement at the step size cannot be the answer, or None."""
    if entry is None:
        return "not measured there"
    if entry["delta"] is None:
        return "the measurement is not finite"
    if entry.get("verdict") == "unusable":
        return "the measurement is unusable"
    if entry.get("below_noise_floor"):
        return "the measurement is below the noise floor of the arithmetic"
    return None


def _length_words(content: dict, correction: float) -> str:
    entropy = content["base_entropy"]
    if not entropy:
        return ""
    change = -correction * content["step_size"] / entropy
    return f" ({abs(change):.1%} {'longer' if change > 0 else 'shorter'} on average)"


def _change(value: float | None, stderr: float | None) -> Markup:
    if value is None:
        return tag("span", "not finite")
    text = plain(value, stderr)
    sign = "+" if value > 0 and not text.startswith("(") else ""
    return tag("data", sign + text, value=repr(value))


def _verb(value: float) -> str:
    return "lowers" if value < 0 else "raises"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
