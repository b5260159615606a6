"""The formats there are, and which of them a row is of."""

from __future__ import annotations

from dentropy.rollouts.formats import areal, messages, nemo_rl, open_instruct, plain, prime_rl, slime, trl, verl
from dentropy.rollouts.formats.format import Format

FORMATS = tuple(m.FORMAT for m in (trl, verl, prime_rl, nemo_rl, open_instruct, areal, slime, messages))


def recognized(where: str, row: dict) -> Format:
    """The format whose columns the row has, dentropy's own where no trainer's are all there."""
    for known in FORMATS:
        if all(name in row for name in known.columns):
            return known
    if any(name in row for name in plain.COLUMNS):
        return plain.FORMAT
    columns = ", ".join(map(repr, list(row)[:12])) or "nothing"
    raise ValueError(f"{where}: only {columns:.300}, expected the columns of a format that is read ({_known()})")


def _known() -> str:
    return "; ".join(f"{known.name}: {', '.join(known.columns)}" for known in FORMATS)
