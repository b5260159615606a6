"""The section on published proxies: how far rules of thumb agree with the exact shares of the update's tokens."""

from __future__ import annotations

from dentropy.experiment.report.sections import section
from dentropy.experiment.report.tables import table
from dentropy.experiment.report.tags import Markup, tag

FORMULAS = {
    "covariance": "−(log π − mean)(A − mean)",
    "surprise": "−A (log π + h)",
    "STEER": "−A π(1 − π)(log π + h)",
    "discriminant": "−A (S* − E S), S* = π (log π + h)",
}
NOTE = (
    "What published rules of thumb say of the same tokens, beside their exact shares. In brackets are 95% intervals "
    "over resampled prompts of the update. Corrected is what R² would be with shares free of noise, from the part of "
    "their squares that is noise, which is itself an estimate; noise lowers the others too, by an unknown amount."
)
SIGNS = {True: "right", False: "wrong", None: None}


def proxies(content: dict) -> Markup | None:
    """The grades; None for a run without."""
    found = content.get("proxies")
    if not found:
        return None
    columns = [
        ("Proxy", "", lambda row: row["name"]),
        ("Formula", "", lambda row: FORMULAS.get(row["name"])),
        ("Rank correlation", "", lambda row: _shown(row["rank_correlation"])),
        ("R²", "", lambda row: _shown(row["r_squared"])),
        ("corrected", "", lambda row: _shown(row["r_squared"], "corrected")),
        ("Same sign", "of tokens", lambda row: _shown(row["sign_agreement"])),
        ("Sign of ΔH", "by its mean", lambda row: SIGNS[row["right_sign"]]),
    ]
    return section(
        "proxies", "Published proxies, graded", tag("p", NOTE, class_="note"), table("Agreement", found, columns)
    )


def _shown(agreement: dict, which: str = "value") -> str | None:
    """ "0.31 (0.25 to 0.36)"; None where it is not known."""
    value, ends = agreement[which], agreement["interval" if which == "value" else "corrected_interval"]
    if value is None:
        return None
    text = _two(value)
    return text if ends is None or None in ends else f"{text} ({_two(ends[0])} to {_two(ends[1])})"


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
