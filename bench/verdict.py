"""What the steps of `prove.py` show: goals, a roofline for every kernel, failures; and the table of all that."""

from plan import STEPS, Case, Checks
from report import duration, memory, rate

LINES = 60  # of the table, at most


def verdict(steps: dict[str, dict]) -> dict:
    """Of what the steps found, by their names: goals, rooflines and failures."""
    plans = {step.name: step for step in STEPS}
    goals, roofline = [], []
    for name, found in steps.items():
        if isinstance(plans[name], Case) and "providers" in found:
            goals += of_goals(plans[name], found["providers"])
            roofline += of_kernels(plans[name], found)
    failures = [f"{name}: {found['failed']}" for name, found in steps.items() if "failed" in found]
    return dict(goals=goals, roofline=roofline, failures=failures)


def of_goals(case: Case, rows: dict) -> list[dict]:
    found = []
    for goal in case.goals:
        try:
            found.append(dict(step=case.name, goal=goal.what, value=goal.read(rows), met=goal.is_met(rows)))
        except KeyError as missing:  # a provider, or its figure, that is not there
            found.append(dict(step=case.name, goal=goal.what, value=None, met=False, why=f"no figure: {missing}"))
    return found


def of_kernels(case: Case, found: dict) -> list[dict]:
    """What each kernel reaches of what the device gives in the same rounds: of its copy's bytes where it reads, of its
    library's products where it multiplies."""
    lines = []
    for kernel, provider in case.kernels.items():
        row = found["providers"].get(provider, {})
        if "rate" in row:
            reference = found["providers"][found["reference"]].get("rate")
            keys = ("median_ms", "rate", "fraction_of_reference")
            numbers = {key: row.get(key) for key in keys}
            lines.append(
                dict(kernel=kernel, step=case.name, unit=found["unit"], ceiling=found["reference"], its_rate=reference)
                | numbers
            )
    return lines


def table(content: dict) -> list[str]:
    """At most LINES lines: tests, figures beside those of peers, rooflines, goals missed, failures."""
    place = content["machine"]
    versions = ", ".join(f"{name} {place[name]}" for name in ("torch", "triton", "transformers") if name in place)
    kind = "dry run, " if content["dry_run"] else ""
    lines = [f"{kind}{place.get('gpu') or 'CPU'}; {versions}; {content['minutes']:g} minutes"]
    plans = {step.name: step for step in STEPS}
    for name, found in content["steps"].items():
        lines.append(f"{name}: {_of_tests(found) if isinstance(plans[name], Checks) else _of_case(found)}")
    lines += _of_goals(content)
    lines += [f"FAILED {failure[:200]}" for failure in content["failures"]]
    lines += ["roofline"] * bool(content["roofline"])
    lines += [f"  {_of_roofline(line)}" for line in content["roofline"]]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} lines more, in the file"]
    return lines


def _of_goals(content: dict) -> list[str]:
    """How many are met, and a line for each that is not."""
    if content["dry_run"]:
        return [f"goals: {len(content['goals'])}, of which a dry run says nothing"]
    missed = [goal for goal in content["goals"] if not goal["met"]]
    lines = [f"goals: {len(content['goals']) - len(missed)} met, {len(missed)} missed"]
    for goal in missed:
        found = goal["why"] if goal["value"] is None else f"found {goal['value']:.3g}"
        lines.append(f"  MISSED {goal['step']}: {goal['goal']}, {found}")
    return lines


def _of_tests(found: dict) -> str:
    return found.get("said") or f"not run: {found['not_run']}"


def _of_case(found: dict) -> str:
    """dentropy's time, memory and place beside the reference; then how many times longer the others take."""
    ours = found.get("providers", {}).get("dentropy", {})
    if "median_ms" not in ours:
        return found.get("failed") or f"not run: {found.get('not_run') or ours.get('not_run')}"
    said = f"{duration(ours['median_ms'])}, {memory(ours['peak_mib_above_inputs'])}"
    if "fraction_of_reference" in ours:
        said += f", {ours['fraction_of_reference']:.0%} of {found['reference']}"
    elif "times_reference" in ours:
        said += f", {ours['times_reference']:.2f} x {found['reference']}"
    others = [
        f"{name} {row['median_ms'] / ours['median_ms']:.2f}x" if "median_ms" in row else f"{name} -"
        for name, row in found["providers"].items()
        if name not in ("dentropy", found["reference"])
    ]
    return f"{said}; {', '.join(others)}"


def _of_roofline(line: dict) -> str:
    said = f"{line['kernel']} ({line['step']}): {duration(line['median_ms'])}, {rate(line['rate'], line['unit'])}"
    if line["fraction_of_reference"] is None:
        return f"{said}; {line['ceiling']} did not run"
    ceiling = f"{rate(line['its_rate'], line['unit'])} of {line['ceiling']}"
    return f"{said}, {line['fraction_of_reference']:.0%} of the {ceiling}"
