"""HTML by function calls: every text is escaped unless `tag` itself made it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "col", "meta"})
# What HTML cannot hold as text: control characters, and lone surrogates as in undecodable file names.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Markup(str):
    """Text that is HTML already. Only `tag` and `join` make it, and the style sheet is the one other."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """The element `name`; children are text (escaped), Markup (as it is), lists of these, or None (left out).

    Attributes are written `class_="wide"`, `aria_label="..."`; those that are None are left out.

    Example:
        >>> tag("td", "a < b", class_="name")
        '<td class="name">a &lt; b</td>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """The children one after the other, as `tag` takes them."""
    return Markup("".join(_content(child) for child in children))


def _content(child: object) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return _escaped(child)
    if isinstance(child, (list, tuple)):
        return join(child)
    raise TypeError(f"a child of a tag is {type(child).__name__}, expected str, Markup, list, tuple or None")


def _escaped(text: str) -> str:
    visible = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return escape(visible, quote=True)
