"""The answer in words: what the update does to the entropy, and by which way."""

from __future__ import annotations

import math

from markupsafe import Markup

from dentropy.experiment.readings import entry_told_apart, part, told_apart
from dentropy.experiment.report.numbers import number, plain, step_text

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
    unusable = doubt(entry)
    if unusable is None:
        value, stderr, reason = entry["delta"], entry["stderr"], entry.get("stderr_reason")
        interval, source = entry.get("interval"), "measured"
    else:
        value, stderr, reason = times(slope["value"], step), times(slope["stderr"], abs(step)), None
        interval, source = None, f"predicted; {unusable}"
    where = f"at step size {step_text(step)}"
    if value is None:
        return f"What this update does to entropy {where} is not known: {unusable}, and no finite prediction."
    if stderr is None:
        missing = f", no error bar: {reason}" if reason else ", no error bar"
        return f"This update {_verb(value)} entropy by {plain(abs(value))} {UNIT} {where} ({source}{missing})."
    if not told_apart(value, stderr, interval):
        return (
            f"This update does not change entropy by an amount that can be told from zero {where}: "
            f"{plain(value, stderr)} {UNIT} ({source})."
        )
    return f"This update {_verb(value)} entropy by {plain(abs(value), stderr)} {UNIT} {where} ({source})."


def comparison(content: dict) -> list[tuple[str, Markup | str]]:
    """Predicted, measured and uncorrected change at the step size, as terms with their values."""
    entry, slope, step = at_step(content), causal(content), content["step_size"]
    rows = [("Predicted before the step", times(slope["value"], step), times(slope["stderr"], abs(step)))]
    if entry is not None:
        rows.append(("Measured by importance sampling", entry["delta"], entry["stderr"]))
    value, stderr = part(slope, "uncorrected")
    rows.append(("What a loop without the length correction reports", times(value, step), times(stderr, abs(step))))
    return [(name, _change(value, stderr)) for name, value, stderr in rows]


def ways(content: dict) -> str | None:
    """How the predicted change comes about: in the same contexts, or through other answers.

    pathwise is what the next-token distributions change at the contexts that were visited; score and
    length_correction together are what other answers change. They are not split further: longer answers of
    average entropy add to both and change nothing. The change of mean length itself follows exactly, to first
    order: −length_correction / H̄, relative. Shares are given only where the two have one sign and the slope and
    both are told from zero; else the amounts.
    """
    slope, step = causal(content), content["step_size"]
    both = [part(slope, name) for name in ("pathwise", "other_answers")]
    (same, _), (other, _) = both
    if None in (same, other, slope["value"]):
        return None
    length = _length_words(content, *part(slope, "length_correction"))
    known = entry_told_apart(slope) and all(stderr is None or told_apart(value, stderr) for value, stderr in both)
    if same * other > 0 and known:
        share = other / (same + other)
        return (
            f"Of the predicted change, {share:.0%} comes through other answers{length} and {1 - share:.0%} "
            "from next-token distributions that change in the same contexts."
        )
    note = " The two have opposite signs: neither is a share of the whole." if same * other < 0 else ""
    amounts = [_signed(times(value, step), times(stderr, abs(step))) for value, stderr in both]
    return (
        f"The predicted change is {amounts[0]} {UNIT} from next-token distributions that change in the same "
        f"contexts, and {amounts[1]} through other answers{length}.{note}"
    )


def doubt(entry: dict | None) -> str | None:
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


def _length_words(content: dict, correction: float, stderr: float | None) -> str:
    entropy = content["base_entropy"]
    if not entropy:
        return ""
    scale = content["step_size"] / entropy
    change, error = -correction * scale, "" if stderr is None else f" ± {abs(stderr * scale):.1%}"
    return f" ({abs(change):.1%}{error} {'longer' if change > 0 else 'shorter'} on average)"


def _change(value: float | None, stderr: float | None) -> Markup | str:
    return "not finite" if value is None else number(value, _signed(value, stderr))


def _signed(value: float, stderr: float | None) -> str:
    text = plain(value, stderr)
    return "+" + text if value > 0 and not text.startswith("(") else text


def _verb(value: float) -> str:
    return "lowers" if value < 0 else "raises"


def times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
