"""What a step buys and what it costs, in a sentence: for the summary and for the page."""

from __future__ import annotations

from dentropy.experiment.readings import entry_told_apart
from dentropy.experiment.report.answer import at_step, doubt
from dentropy.experiment.report.numbers import plain, step_text


def trade(content: dict) -> str | None:
    """Reward, entropy, length and divergence at the step size, and the exchange rate; None for runs of before.

    They are measured, or predicted from the slopes where the measurement there cannot be used. What is null is left
    out; what is not told apart from 0 is said to be so.
    """
    found = content.get("forecast")
    if found is None:
        return None
    step = content["step_size"]
    measured = doubt(at_step(content)) is None
    parts = [
        _part(at(found["reward"], step, measured), "buys reward", "costs reward", "reward", ""),
        _part(at(found["entropy"], step, measured), "adds entropy", "costs entropy", "entropy", " nats per token"),
        _length(at(found["length"], step, measured)),
        _divergence(divergence_at(found["kl"]["sequence"], step, measured)),
    ]
    said = [part for part in parts if part is not None]
    how = "measured" if measured else "predicted"
    if not said:
        return None
    *first, last = said
    whole = f"{', '.join(first)} and {last}" if first else last
    return f"At step size {step_text(step)} this step {whole} ({how}).{_rate(found, step, measured)}"


def at(change: dict | None, step: float, measured: bool) -> dict | None:
    """The change at the step size, {value, stderr, interval}; None where there is none."""
    if change is None:
        return None
    if measured:
        return _known(_entry(change["changes"], step))
    slope = change["slope"]
    if slope["value"] is None:
        return None
    interval = slope["interval"]
    return {
        "value": slope["value"] * step,
        "stderr": None if slope["stderr"] is None else slope["stderr"] * abs(step),
        "interval": None if interval is None or None in interval else sorted(end * step for end in interval),
    }


def divergence_at(kl: dict, step: float, measured: bool) -> dict | None:
    """The KL divergence at the step size."""
    if measured:
        return _known(_entry(kl["changes"], step))
    fisher = kl["fisher"]
    if fisher is None or fisher["value"] is None:
        return None
    factor = step**2 / 2
    return {"value": fisher["value"] * factor, "stderr": fisher["stderr"] and fisher["stderr"] * factor}


def _known(entry: dict | None) -> dict | None:
    return None if entry is None or entry["value"] is None else entry


def _entry(changes: list[dict], step: float) -> dict | None:
    return next((c for c in changes if at_step({"step_size": step, "measured": [c]})), None)


def _part(change: dict | None, up: str, down: str, name: str, unit: str) -> str | None:
    if change is None:
        return None
    text = signed(change["value"], change["stderr"]) + unit
    if change["stderr"] is not None and not entry_told_apart(change):
        return f"does not change {name} measurably ({text})"
    return f"{up if change['value'] > 0 else down} {text}"


def _length(change: dict | None) -> str | None:
    part = _part(change, "", "", "length", " tokens")
    if part is None or part.startswith("does not"):
        return part
    verb = "lengthens" if change["value"] > 0 else "shortens"
    return f"{verb} answers by {plain(abs(change['value']), change['stderr'])} tokens"


def _divergence(change: dict | None) -> str | None:
    if change is None:
        return None
    return f"moves the policy by a KL divergence of {plain(change['value'], change['stderr'])} nats per rollout"


def _rate(found: dict, step: float, measured: bool) -> str:
    rates = found["exchange_rate"]
    if rates is None:
        return ""
    rate = _entry(rates["changes"], step) if measured else rates["slope"]
    if rate is None or rate["value"] is None or rate["interval"] is None:
        reason = rates["slope"]["reason"] if rate is None else rate["reason"]
        return f" No exchange rate{f': {reason}' if reason else ''}."
    low, high = rate["interval"]
    value, low, high = (plain(x, (high - low) / 4, error=False) for x in (rate["value"], low, high))
    return f" Exchange rate: {value} nats per token of entropy per unit of reward (95%: {low} to {high})."


def signed(value: float, stderr: float | None) -> str:
    """ "+0.012 ± 0.003"."""
    text = plain(value, stderr)
    if text.startswith("("):
        return f"(+{text[1:]}" if value > 0 else text
    return f"+{text}" if value > 0 else text
