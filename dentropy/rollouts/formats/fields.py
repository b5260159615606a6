"""Checked values of one row: each error names the place and the column."""

from __future__ import annotations

from dentropy.rollouts.files import Rows
from dentropy.rollouts.readers import check_label, check_number, is_number, tokens_of


def present(where: str, row: dict, name: str):
    if row.get(name) is None:
        raise ValueError(f"{where}: no {name}, expected one in every row")
    return row[name]


def ids(where: str, row: dict, name: str) -> list[int]:
    return tokens_of(where, row, (name,), (), None)


def count(where: str, row: dict, name: str, most: int) -> int:
    value = present(where, row, name)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{where}: {name}: {value!r:.40}, expected a whole number from 0 to {most}")
    return value


def number(where: str, row: dict, name: str) -> float:
    value = present(where, row, name)
    check_number(f"{where}: {name}", value)
    return float(value)


def label(where: str, row: dict, name: str):
    value = present(where, row, name)
    check_label(f"{where}: {name}", value)
    return value


def text(where: str, row: dict, name: str) -> str:
    value = present(where, row, name)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name}: {type(value).__name__}, expected text")
    return value


def values(where: str, row: dict, name: str, n: int) -> list:
    value = present(where, row, name)
    if not isinstance(value, list) or len(value) != n:
        found = f"{len(value)} values" if isinstance(value, list) else f"{value!r:.40}"
        raise ValueError(f"{where}: {name}: {found}, expected one for each of {n} tokens")
    return value


def numbers(where: str, row: dict, name: str, kept: list[bool]) -> list[float]:
    """Those at the tokens kept, of one for each token; what stands at the others does not matter."""
    found = [value for value, keep in zip(values(where, row, name, len(kept)), kept, strict=True) if keep]
    for value in found:
        check_number(f"{where}: {name}", value)
    return [float(value) for value in found]


def mask(where: str, row: dict, name: str, n: int) -> list[bool]:
    found = values(where, row, name, n)
    if not all(isinstance(flag, (bool, int, float)) and flag in (0, 1) for flag in found):
        raise ValueError(f"{where}: {name}: {found!r:.40}, expected 0s and 1s")
    return [bool(flag) for flag in found]


def reward_column(rows: Rows, asked: str | None, usual: str | None, others: tuple[str, ...] = ()) -> str | None:
    """Which column is the reward: the one asked for, else the usual one, else the only one of numbers.

    Args:
        usual: its name where the format has one; None where it is named after a function.
        others: columns of numbers that are no rewards.

    Raises:
        ValueError: naming the choices, where several could be meant or the one asked for is not there.
    """
    names = dict.fromkeys(name for _, row in rows for name in row)
    choices = [name for name in names if name not in others and _has_numbers(rows, name)]
    place = rows[0][0]
    if asked is not None:
        if asked not in choices:
            raise ValueError(f"reward: {asked!r} is no column of numbers at {place}, expected one of {_list(choices)}")
        return asked
    if usual is not None:
        return usual if usual in names else None
    if len(choices) > 1:
        raise ValueError(
            f"{place}: reward: any of {_list(choices)}, expected a choice (reward={choices[0]!r}, "
            f"--reward-column {choices[0]})"
        )
    return choices[0] if choices else None


def source(rows: Rows) -> str:
    """The file that the first row is from."""
    return rows[0][0].rpartition(": ")[0]


def same_kind(rows: Rows, name: str) -> bool:
    """Whether rows have the column; where some have it, all have to."""
    having = [row.get(name) is not None for _, row in rows]
    if any(having) and not all(having):
        where = rows[having.index(False)][0]
        raise ValueError(f"{where}: no {name}, expected one as in other rows")
    return any(having)


def _has_numbers(rows: Rows, name: str) -> bool:
    """NaN is a number here, and one value is enough: an error about another says more than no column would."""
    return any(isinstance(row.get(name), (bool, float)) or is_number(row.get(name)) for _, row in rows)


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "none there"
