"""The section on published proxies: how far rules of thumb agree with the exact shares of the update's tokens."""

from __future__ import annotations

from dentropy.experiment.report.numbers import rounded
from dentropy.experiment.report.tables import table

FORMULAS = {
    "covariance": "−(log π − mean)(A − mean)",
    "surprise": "−A (log π + h)",
    "STEER": "−A π(1 − π)(log π + h)",
    "discriminant": "−A (S − E S), S = π (log π + h)",
}
SIGNS = {True: "right", False: "wrong", None: None}


def proxies(content: dict) -> dict | None:
    """The grades; None for a run without."""
    found = content.get("proxies")
    if not found:
        return None
    columns = [
        ("Proxy", "", lambda row: row["name"]),
        ("Formula", "", lambda row: FORMULAS.get(row["name"])),
        ("Rank correlation", "", lambda row: _shown(row["rank_correlation"])),
        ("R²", "", lambda row: _shown(row["r_squared"])),
        ("R², corrected", "", lambda row: _shown(row["r_squared"], "corrected")),
        ("Same sign", "of tokens", lambda row: _shown(row["sign_agreement"])),
        ("Sign of ΔH", "by its mean", lambda row: SIGNS[row["right_sign"]]),
    ]
    return {"title": "Published proxies, graded", "table": table("Agreement with the shares", found, columns)}


def _shown(agreement: dict, which: str = "value") -> str | None:
    """ "0.31 (0.25 to 0.36)"; None where it is not known."""
    value, ends = agreement[which], agreement["interval" if which == "value" else "corrected_interval"]
    if value is None:
        return None
    if ends is None or None in ends:
        return _two(value)
    return f"{_two(value)} ({_two(ends[0])} to {_two(ends[1])})"


def _two(value: float) -> str:
    return rounded(value, 0.1)
