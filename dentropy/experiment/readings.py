"""What the numbers of results.json say, decided once for the summary and the page: told apart from 0, in agreement."""

from __future__ import annotations


def told_apart(value: float | None, stderr: float | None, interval: list | None = None) -> bool:
    """Is the value told apart from 0: by its 95% interval, or 2 standard errors where there is none?

    Example:
        >>> told_apart(2.1, 1.0), told_apart(2.1, 1.0, [-0.2, 4.4]), told_apart(2.1, None)
        (True, False, False)
    """
    if interval is not None and None not in interval:
        return not interval[0] <= 0 <= interval[1]
    return value is not None and stderr is not None and abs(value) > 2 * stderr


def entry_told_apart(entry: dict, name: str = "value") -> bool:
    """`told_apart` for an entry of results.json whose number is under `name`."""
    return told_apart(entry[name], entry["stderr"], entry.get("interval"))


def part(slope: dict, name: str) -> tuple[float | None, float | None]:
    """A part of a slope and its standard error.

    Runs of earlier versions have neither errors nor `other_answers`, the sum of score and length correction.
    """
    if name == "other_answers" and name not in slope:
        terms = slope["score"], slope["length_correction"]
        return (None if None in terms else sum(terms)), None
    return slope[name], slope.get("part_stderrs", {}).get(name)


def temperature_text(temperature: float | list[float]) -> str:
    """That of results.json: one, or the lowest and the highest of several.

    Example:
        >>> temperature_text(1.0), temperature_text([0.6, 0.8, 1.0])
        ('1', '0.6 to 1')
    """
    if not isinstance(temperature, list):
        return f"{temperature:g}"
    return f"{min(temperature):g} to {max(temperature):g}"


def disagreement(measured: list[dict]) -> str | None:
    """A sentence on the η at which prediction and measurement part, where the measurement can be used."""
    apart = []
    for row in measured:
        error, stderr = row.get("prediction_error"), row.get("prediction_error_stderr")
        if row.get("verdict") != "unusable" and _beyond_two(error, stderr):
            apart.append(f"{row['eta']:.3g} ({abs(error) / stderr:.1f})")
    if not apart:
        return None
    return (
        "Linear prediction and measurement disagree, by more than 2 standard errors of their paired difference, at "
        f"η = {', '.join(apart)}"
    )


def forms_apart(measured: list[dict]) -> str | None:
    """A sentence on the η at which the measurements with prefix and with sequence weights part, where both count."""
    apart = []
    for row in measured:
        other = row.get("sequence") or {}
        usable = "unusable" not in (row.get("verdict"), other.get("verdict"))
        if usable and _beyond_two(other.get("difference"), other.get("difference_stderr")):
            apart.append(f"{row['eta']:.3g} ({abs(other['difference']) / other['difference_stderr']:.1f})")
    if not apart:
        return None
    return (
        "Measurements with prefix and with sequence weights differ, by more than 2 standard errors of their paired "
        f"difference, at η = {', '.join(apart)}"
    )


def curvatures_apart(curvature: dict) -> str | None:
    """A sentence where the causal and the exact curvature part."""
    exact = curvature.get("exact") or {}
    if not _beyond_two(exact.get("difference"), exact.get("difference_stderr")):
        return None
    distance = abs(exact["difference"]) / exact["difference_stderr"]
    return f"The causal and the exact curvature differ by {distance:.1f} standard errors of their paired difference"


def _beyond_two(value: float | None, stderr: float | None) -> bool:
    return value is not None and bool(stderr) and abs(value) > 2 * stderr


def cut_short(audit: dict) -> str | None:
    """A sentence on the rollouts that a length cap cut, where they are some and not all."""
    cut, total = audit.get("rollouts_without_end") or 0, audit["rollouts_used"]
    if not 0 < cut < total:
        return None
    return (
        f"{cut:,} of {total:,} rollouts ({cut / total:.1%}) stop without an end token, cut at some length: "
        "entropies, slopes and changes are those of the process with this cut"
    )
