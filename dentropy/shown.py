"""How objects look in a session: one line, or a few, with numbers in their units and with their standard errors.

A repr reads what is there and computes nothing large: a debugger asks for it at every stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def line(thing: object, *parts: str | None) -> str:
    """The repr of an object: its class and those of the parts that are there.

    Example:
        >>> line([], "3 rollouts", None, "temperature 1")
        '<list: 3 rollouts, temperature 1>'
    """
    return f"<{type(thing).__name__}: {', '.join(filter(None, parts))}>"


def lines(thing: object, rows: Iterable[tuple[str, str]]) -> str:
    """The repr of an object with several numbers: each on a line, behind its name.

    Example:
        >>> print(lines([], [("slope", "-1.00"), ("ΔH", "2.00")]))
        <list
          slope  -1.00
          ΔH     2.00>
    """
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n  ".join([f"<{type(thing).__name__}", *(f"{name:{width}}  {text}" for name, text in rows)]) + ">"


def number(value: float | None, stderr: float | None, unit: str = "") -> str:
    """A number with its standard error and unit; "?" for what there is not.

    Example:
        >>> number(-0.01522, 0.00101, "nats per token"), number(1.5, None)
        ('-1.522e-02 ± 1.0e-03 nats per token', '1.500e+00 ± ?')
    """
    value, stderr = ("?" if x is None else form.format(x) for x, form in ((value, "{:.3e}"), (stderr, "{:.1e}")))
    return f"{value} ± {stderr} {unit}".rstrip()


def count(n: int, noun: str) -> str:
    """So many of something whose plural has an s.

    Example:
        >>> count(1, "rollout"), count(4096, "token")
        ('1 rollout', '4,096 tokens')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A small table for a notebook; every text is escaped.

    Example:
        >>> html_table("a<b", ["η"], [["1"]])
        '<table><caption>a&lt;b</caption><tr><th>η</th></tr><tr><td>1</td></tr></table>'
    """

    def row(cells: Iterable[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = row(head, "th") + "".join(row(cells, "td") for cells in rows)
    return f"<table><caption>{escape(caption)}</caption>{body}</table>"


def data_frame(columns: Mapping[str, object]):
    """The columns as a pandas DataFrame; ImportError where pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError('to_pandas needs pandas: pip install "pandas>=2.2"') from error
    return pandas.DataFrame(dict(columns))
