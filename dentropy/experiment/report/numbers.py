"""Numbers as text: the digits that the standard error allows, units in powers of 1000, real minus signs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MISSING = "–"


@dataclass(frozen=True)
class Unit:
    """Numbers are shown as value · factor, in `name`."""

    factor: float
    name: str


def unit_for(values: Iterable[float | None], name: str) -> Unit:
    """The unit 10^(3n) `name` in which the largest of `values` lies between 1 and 1000."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    exponent = 3 * math.floor(math.log10(largest) / 3) if largest > 0 else 0
    prefix = f"10{str(exponent).translate(SUPERSCRIPT)} " if exponent else ""
    return Unit(10.0**-exponent, prefix + name)


def rounded(value: float, stderr: float | None = None, *, factor: float = 1.0, digits: int = 2) -> str:
    """value · factor, to `digits` digits of its standard error; three digits of itself without one."""
    return _minus(f"{value * factor:.{_decimals(value, stderr, factor, digits)}f}")


def plain(value: float, stderr: float | None = None, *, error: bool = True) -> str:
    """ "0.0066 ± 0.0006", or "(6.6 ± 0.6)×10⁻⁷" where the zeros would be too many to count.

    The error has one digit, or two where it begins with 1 or 2; error=False leaves it out.
    """
    shown = _exponent(value, stderr, least=-4)
    factor, power = 10.0**-shown, power_of_ten(shown)
    digits = 2 if stderr and f"{stderr:.1e}" < "2.95" else 1
    text = rounded(value, stderr, factor=factor, digits=digits)
    if stderr is None or not error:
        return text + power
    text += f" ± {rounded(stderr, stderr, factor=factor, digits=digits)}"
    return f"({text}){power}" if power else text


def power_of_ten(exponent: int) -> str:
    """ "×10⁻⁷", and nothing for 0."""
    return f"×10{str(exponent).translate(SUPERSCRIPT)}" if exponent else ""


def step_text(eta: float) -> str:
    """η as it is typed: 1e-4, −2.5e-05 as −2.5e-5, 0.01."""
    mantissa, exponent = f"{abs(eta):.5e}".split("e")
    short = mantissa.rstrip("0").rstrip(".")
    size = f"{abs(eta):g}" if eta == 0 or -3 <= int(exponent) < 5 else f"{short}e{int(exponent)}"
    return ("−" if eta < 0 else "") + size


def amount(value: float | None, stderr: float | None, unit: Unit) -> str:
    """ "−6.61 ± 0.56" in `unit`, as text."""
    if value is None:
        return "not finite"
    shown = _exponent(value * unit.factor, stderr and stderr * unit.factor, least=-3)
    factor, power = unit.factor * 10.0**-shown, power_of_ten(shown)
    if stderr is None:
        return rounded(value, factor=factor) + power
    text = f"{rounded(value, stderr, factor=factor)} ± {rounded(stderr, stderr, factor=factor)}"
    return f"({text}){power}" if power else text


def number(value: float | None, text: str | None = None) -> Markup:
    """The text, with the whole number behind it in the element's value; a dash where there is none."""
    if value is None:
        return Markup('<span class="missing">{}</span>').format(MISSING)
    return Markup('<data value="{!r}">{}</data>').format(value, f"{value:,}" if text is None else text)


def quantity(value: float | None, unit: Unit, stderr: float | None = None) -> Markup | None:
    """The value in `unit`, to the digits its standard error allows; None for None."""
    if value is None:
        return None
    shown = _exponent(value * unit.factor, stderr and stderr * unit.factor, least=-3)
    return number(value, rounded(value, stderr, factor=unit.factor * 10.0**-shown) + power_of_ten(shown))


def with_error(value: float | None, stderr: float | None, unit: Unit) -> Markup | None:
    """value ± standard error in `unit`, "± ?" without one; None for None."""
    if value is None:
        return None
    shown = _exponent(value * unit.factor, stderr and stderr * unit.factor, least=-3)
    factor, power = unit.factor * 10.0**-shown, power_of_ten(shown)
    error = "?" if stderr is None else number(stderr, rounded(stderr, stderr, factor=factor))
    form = '<span class="nowrap">({} ± {}){}</span>' if power else '<span class="nowrap">{} ± {}{}</span>'
    return Markup(form).format(number(value, rounded(value, stderr, factor=factor)), error, power)


def interval(ends: list | None, unit: Unit, stderr: float | None) -> Markup | None:
    """ "low to high" in `unit`; None without both ends."""
    if ends is None or None in ends:
        return None
    return Markup('<span class="nowrap">{} to {}</span>').format(*(quantity(end, unit, stderr) for end in ends))


def digits(value: float | None, digits: int = 3) -> Markup | None:
    """To so many digits; None for None."""
    return None if value is None else number(value, _minus(f"{value:.{digits}g}"))


def eta(value: float | None) -> Markup | None:
    """An η of which three digits say enough; None for None."""
    return None if value is None else number(value, step_text(float(f"{value:.3g}")))


def percent(value: float | None, decimals: int = 1) -> Markup | None:
    """A fraction in per cent; None for None."""
    return None if value is None else number(value, _minus(f"{100 * value:.{decimals}f}%"))


def _exponent(value: float, stderr: float | None, *, least: int) -> int:
    """The power of ten to write apart, 0 while the larger of the two is from 10^least on and below 10^5."""
    largest = max(abs(value), stderr or 0.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return exponent if not least <= exponent < 5 else 0


def _decimals(value: float, stderr: float | None, factor: float, digits: int) -> int:
    leading, kept = (stderr * factor, digits) if stderr else (value * factor, 3)
    if leading == 0:
        return 0
    # As rounding leaves it: 0.0996 to two digits is 0.10.
    exponent = int(f"{leading:.{kept - 1}e}".split("e")[1])
    return min(max(kept - 1 - exponent, 0), 12)


def _minus(text: str) -> str:
    return text.replace("-", "−")
