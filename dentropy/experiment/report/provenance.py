"""The sections on what to beware of and on how the run was made."""

from __future__ import annotations

from dentropy.experiment.cost import cost_text
from dentropy.experiment.readings import cut_short, temperature_text
from dentropy.experiment.report.numbers import Unit, step_text, with_error
from dentropy.experiment.report.sections import NATS, PER_ETA, digits, section
from dentropy.experiment.report.tables import table
from dentropy.experiment.report.tags import Markup, tag
from dentropy.experiment.summary import warnings

CHECKS = {
    "logp_plus_entropy": "log-probability + entropy (nats)",
    "dlogp": "derivative of the log-probability (nats per unit of η)",
}


def audit(content: dict) -> Markup:
    """Warnings, what was used, what adds up, and whether the rollouts are this policy's own."""
    found = content["audit"]
    used = (
        f"{found['rollouts_used']:,} of {found['rollouts_expected']:,} rollouts and "
        f"{found['tokens_used']:,} of {found['tokens_expected']:,} tokens used."
    )
    warned, cut = warnings(content), cut_short(found)
    listed = tag("ul", [tag("li", text) for text in warned], class_="warnings") if warned else None
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
    return section(
        "audit",
        "Audit and warnings",
        listed or tag("p", "No warnings."),
        tag("p", used),
        cut and tag("p", f"{cut}."),
        table("Are the rollouts this policy's own?", checks, check_columns) if checks else None,
        tag(
            "details",
            tag("summary", "Do the contributions add up?"),
            table(f"Sums in {NATS} (changes, delta) and {PER_ETA} (slopes)", sums, sum_columns),
        ),
    )


def provenance(content: dict) -> Markup:
    """How it was run: source, sizes, seeds, versions."""
    entropy = with_error(content["base_entropy"], content["base_entropy_stderr"], Unit(1.0, NATS))
    facts = [(f"Source, {name}", str(value)) for name, value in content["source"].items()]
    facts += [
        ("Rollouts", f"{content['n_sequences']:,} of {content['n_groups']:,} prompts, {content['n_tokens']:,} tokens"),
        ("Entropy before the update", _said(entropy, f" {NATS}")),
        ("Step size", step_text(content["step_size"])),
        ("Temperature", temperature_text(content["temperature"])),
        ("Standard errors for", {"random": "prompts drawn at random"}.get(content["prompts"], "this set of prompts")),
        ("Run in", f"{content['dtype']} on {content['device']}"),
        ("This run", cost_text(content)),
    ]
    facts += [(f"Seed, {name.replace('_', ' ')}", str(value)) for name, value in content["seeds"].items()]
    facts += [(name, value or "not installed") for name, value in content["versions"].items()]
    return section("provenance", "How it was run", _facts(facts))


def _facts(facts: list[tuple[str, object]]) -> Markup | None:
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts if value is not None]
    return tag("dl", rows, class_="facts") if rows else None


def _said(shown: Markup | None, unit: str) -> list | None:
    return None if shown is None else [shown, unit]
