"""The sections on what to beware of and on how the run was made."""

from __future__ import annotations

from markupsafe import Markup

from dentropy.experiment import base_weight_entry
from dentropy.experiment.cost import cost_text
from dentropy.experiment.drawing import NATS
from dentropy.experiment.readings import cut_short, temperature_text
from dentropy.experiment.report.numbers import Unit, digits, number, step_text, with_error
from dentropy.experiment.report.slopes import PER_ETA
from dentropy.experiment.report.tables import Table, table
from dentropy.experiment.warned import warned

CHECKS = {
    "logp_plus_entropy": "log-probability + entropy (nats)",
    "dlogp": "derivative of the log-probability (nats per unit of η)",
    "base_weight": "base weight of a rollout, less 1",
    "token_weight": "weights of its tokens, less 1 each",
    "token_logp_plus_entropy": "log-probability + entropy, each token with its own weight (nats)",
    "token_dlogp": "derivative of the log-probability, each token with its own weight (nats per unit of η)",
}

PARTS = {
    "forward": "Measurements and second differences",
    "tangent": "Slope",
    "reverse": "Gradient for the shares of parameters and of the update's tokens",
    "noise_floor": "Noise floors",
    "update": "Shares of the update's tokens",
    "groups": "Groups of these with error bars",
    "proxies": "Grades of published proxies",
}


def audit(content: dict) -> dict:
    """Warnings, what was used, what adds up, and whether the rollouts are this policy's own."""
    found = content["audit"]
    checks = [{"name": name, **check} for name, check in found["on_policy"].items() if check is not None]
    check_columns = [
        ("Mean per rollout", "expected 0", lambda row: CHECKS.get(row["name"], row["name"])),
        ("Value", "± SE", lambda row: with_error(row["mean"], row["stderr"], Unit(1.0, ""))),
        ("z", "standard errors from 0", lambda row: digits(row["z"])),
    ]
    sums = [{"name": name, **row} for name, row in found["contributions"].items()]
    sum_columns = [
        ("Contributions", "", lambda row: row["name"]),
        ("Their sum", "", lambda row: digits(row["sum"], 10)),
        ("Expected", "", lambda row: digits(row["expected"], 10)),
    ]
    return {
        "title": "Audit and warnings",
        "warnings": warned(content),
        "counts": [
            f"{found[f'{what}_used']:,} of {found[f'{what}_expected']:,} {what}" for what in ("rollouts", "tokens")
        ],
        "cut": cut_short(found),
        "checks": table("Are the rollouts this policy's own?", checks, check_columns) if checks else None,
        "sums": table(f"Sums in {NATS} (changes, delta) and {PER_ETA} (slopes)", sums, sum_columns),
    }


def provenance(content: dict) -> dict:
    """How it was run: source, sizes, when and by which command, seeds, versions, cost."""
    entropy = with_error(content["base_entropy"], content["base_entropy_stderr"], Unit(1.0, NATS))
    made = content.get("provenance") or {}
    seconds = made.get("seconds")
    facts = [(f"Source, {name}", str(value)) for name, value in content["source"].items()]
    facts += [
        ("Rollouts", f"{content['n_sequences']:,} of {content['n_groups']:,} prompts, {content['n_tokens']:,} tokens"),
        ("Sampler", base_weight_entry.text(content.get("base_weights"))),
        ("Entropy before the update", entropy and Markup("{} {}").format(entropy, NATS)),
        ("Step size", step_text(content["step_size"])),
        ("Temperature", temperature_text(content["temperature"])),
        ("Standard errors for", {"random": "prompts drawn at random"}.get(content["prompts"], "this set of prompts")),
        ("Run in", f"{content['dtype']} on {content['device']}"),
        ("Begun", made.get("date")),
        ("Command", made.get("command")),
        ("Duration of the passes", None if seconds is None else f"{seconds:,.1f} s"),
        ("This run", cost_text(content)),
    ]
    facts += [(f"Seed, {name.replace('_', ' ')}", str(value)) for name, value in content["seeds"].items()]
    facts += [(name, value or "not installed") for name, value in content["versions"].items()]
    shown = [(name, value) for name, value in facts if value is not None]
    return {"title": "How it was run", "facts": shown, "cost": _cost(content)}


def _cost(content: dict) -> Table | None:
    """Which part of a run costs what; None for a run of a version that did not say."""
    passes = (content.get("provenance") or {}).get("forward_passes")
    if passes is None:
        return None
    rows = [*((PARTS[name], value) for name, value in passes.items()), ("Sum", sum(passes.values()))]
    columns = [("Part", "", lambda row: row[0]), ("Cost", "", lambda row: number(row[1], f"{row[1]:.1f}"))]
    return table("What each part costs, in plain forward passes over the rollouts", rows, columns)
