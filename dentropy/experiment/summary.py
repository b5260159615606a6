"""The summary of a run: the content of results.json as a text that a person reads."""

from __future__ import annotations

from dentropy.experiment import base_weight_entry
from dentropy.experiment.cost import cost_text
from dentropy.experiment.readings import (
    curvatures_apart,
    cut_short,
    disagreement,
    entry_told_apart,
    forms_apart,
    part,
    temperature_text,
)
from dentropy.experiment.trade import trade
from dentropy.experiment.warned import warned


def summary(content: dict) -> str:
    """The summary of a run from the content of its results.json, without a final newline."""
    parts = [*filter(None, [trade(content)]), _head(content), _slopes(content), _changes(content), _verdicts(content)]
    if content["fresh_check"] is not None:
        parts.append(_fresh(content["fresh_check"], content["measured"]))
    parts.append(_audit(content["audit"]))
    if found := warned(content):
        parts.append("\n".join(["Warnings", *(f"  {text}" for text in found)]))
    return "\n\n".join(parts)


def _head(content: dict) -> str:
    lines = [f"{name}: {value}" for name, value in content["source"].items()]
    lines.append(
        f"{content['n_sequences']:,} rollouts of {content['n_groups']:,} prompts, "
        f"{content['n_tokens']:,} tokens, temperature {temperature_text(content['temperature'])}, "
        f"{content['dtype']} on {content['device']}"
    )
    entropy = _with_error(content["base_entropy"], content["base_entropy_stderr"], "{:.4f}", "{:.4f}")
    lines.append(f"entropy of the policy: {entropy} nats per token")
    spent = cost_text(content)
    sampler = base_weight_entry.text(content.get("base_weights"))
    return "\n".join([*lines, *([sampler] if sampler else []), *([f"this run: {spent}"] if spent else [])])


def _slopes(content: dict) -> str:
    slopes = content["slope"]
    rows = [
        (
            s["estimator"],
            _with_error(s["value"], s["stderr"]),
            *(_part(s, name) for name in ("pathwise", "other_answers")),
            *(_number(s[name]) for name in ("score", "length_correction")),
        )
        for s in slopes
    ]
    mixed = next(s for s in slopes if s["estimator"] == "mixed")
    parts = (_part(mixed, name) for name in ("uncorrected", "pathwise", "score"))
    rows.append(("uncorrected", *parts, _number(mixed["score"]), "-"))
    head = ("estimator", "slope ± SE", "pathwise ± SE", "other answers ± SE", "= score", "+ length correction")
    title = "Slope of the entropy at η = 0, in nats per token per unit of η"
    return "\n".join([title, *_aligned(head, rows), *_reach(content), *_reasons(slopes)])


def _part(slope: dict, name: str) -> str:
    return _with_error(*part(slope, name))


def _reach(content: dict) -> list[str]:
    if content["curvature"] is None:
        reason = content.get("no_curvature")
        return [] if reason is None else [f"no curvature: {reason}"]
    curvature, trust = content["curvature"], content["trust"]
    value = _with_error(curvature["value"], curvature["stderr"]).strip()
    apart = curvatures_apart(curvature)
    more = [apart] if apart else []
    if not entry_told_apart(curvature):
        return [f"curvature {value} per unit of η²: not told apart from 0", *more]
    limit = "at no η" if trust["linear_until"] is None else f"beyond η = {trust['linear_until']:.2g}"
    return [f"curvature {value} per unit of η²; it changes the linear prediction by a tenth {limit}", *more]


def _verdicts(content: dict) -> str:
    lines = [f"  {m['eta']: .3g}  {_verdict(m)}" for m in content["measured"]]
    apart = (
        "Valid only if these rollouts did not make the update: judged on its own rollouts an update is biased,\n"
        "often to the wrong sign."
    )
    floor = f"Rounding alone can make a ΔH of {content['noise_floor']:.1e} nats per token (the noise floor)."
    return "\n".join(["Can the measurements be believed?", *lines, floor, apart])


def _verdict(row: dict) -> str:
    """What is said of the weights, and of ΔH beside it."""
    whose = "" if row["below_noise_floor"] else "the weights are "
    known = row["delta"] is not None and row["stderr"] is not None
    near = "" if not known or entry_told_apart(row, "delta") else "; ΔH is not told apart from 0"
    return f"{whose}{row['verdict']}: {row['verdict_reason']}{near}"


def _changes(content: dict) -> str:
    step = content["step_size"]
    rows = [
        (
            f"{m['eta']: .3g}",
            f"{m['eta'] / step: .3g}",
            _number(m["predicted_uncorrected"]),
            _with_error(m["predicted_linear"], m["predicted_linear_stderr"]),
            "-" if m["predicted_quadratic"] is None else _number(m["predicted_quadratic"]),
            _with_error(m["delta"], m["stderr"]),
            f"{m['ess_fraction']:.1%}",
        )
        for m in content["measured"]
    ]
    head = ("η", "steps", "uncorrected", "predicted ± SE", "quadratic", "measured ± SE", "ESS")
    measured = content["measured"]
    how = ", prefix weights" if measured[0].get("weights") == "prefix" else ""
    title = (
        f"Change of the entropy ΔH(η), in nats per token; one step is η = {step:g}\n"
        f"predicted = η · causal slope, quadratic with η²/2 · curvature; measured by importance sampling{how}"
    )
    apart = [text for text in (disagreement(measured), forms_apart(measured)) if text]
    return "\n".join([title, *_aligned(head, rows), *apart, *_reasons(measured)])


def _fresh(fresh: dict, measured: list[dict]) -> str:
    at = next(m for m in measured if m["eta"] == fresh["eta"])
    rows = [
        ("importance sampling", _with_error(at["delta"], at["stderr"])),
        ("fresh rollouts", _with_error(fresh["delta"], fresh["stderr"])),
        ("difference", _with_error(fresh["difference"], fresh["difference_stderr"])),
    ]
    title = (
        f"Check at η = {fresh['eta']:g}: ΔH from {fresh['n_sequences']:,} rollouts "
        f"({fresh['n_tokens']:,} tokens) drawn anew from the moved policy"
    )
    return "\n".join([title, *_aligned(("", "ΔH ± SE"), rows)])


def _audit(audit: dict) -> str:
    z = {name: check["z"] for name, check in audit["on_policy"].items() if check is not None}
    scores = ", ".join(f"{name} z = " + ("undefined" if value is None else f"{value:.1f}") for name, value in z.items())
    cut = cut_short(audit)
    return (
        f"Audit: {audit['rollouts_used']:,} of {audit['rollouts_expected']:,} rollouts and "
        f"{audit['tokens_used']:,} of {audit['tokens_expected']:,} tokens used; on policy: {scores}"
    ) + (f"\n{cut}" if cut else "")


def _number(value: float | None, form: str = "{: .3e}") -> str:
    return "not finite" if value is None else form.format(value)


def _with_error(value: float | None, stderr: float | None, form: str = "{: .3e}", error_form: str = "{:.1e}") -> str:
    return f"{_number(value, form)} ± " + ("?" if stderr is None else error_form.format(stderr))


def _reasons(entries) -> list[str]:
    """Why there are no standard errors: each reason once."""
    reasons = {entry["stderr_reason"]: None for entry in entries if entry["stderr_reason"] is not None}
    return [f"no standard error (?): {reason}" for reason in reasons]


def _aligned(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """The rows under their head, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
