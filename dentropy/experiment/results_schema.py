"""What a results.json must hold to be read: results.schema.json beside this file, and what a schema cannot say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from dentropy.doors import third_party

LARGEST_INTEGER = 2**63 - 1


def check(content: dict, where: str) -> None:
    """ValueError naming the file and the first field that is missing, of another type or out of its range.

    Fields that are not known are left alone: a later version may have written them. A number that is null for not
    being finite is one that `not_finite` names.
    """
    nulls = set()
    for field, value in _leaves(content):
        if value is None:
            nulls.add(".".join(field))
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {_name(field)}: {value}, expected a finite number (JSON knows no other)")
        elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise ValueError(f"{where}: {_name(field)}: an integer of {value.bit_length()} bits, expected 64 at most")
    found = content.get("not_finite")
    not_finite = set(found) if isinstance(found, dict) else set()
    for error in sorted(_validator().iter_errors(content), key=lambda error: len(error.absolute_path)):
        field = [str(part) for part in error.absolute_path]
        if error.instance is None and error.validator == "type" and ".".join(field) in not_finite:
            continue
        expected = f"{error.validator} {json.dumps(error.validator_value):.100}"
        said = error.message if error.validator == "required" else f"{error.instance!r:.60}, expected {expected}"
        raise ValueError(f"{where}: {_name(field)}: {said}")
    if not not_finite <= nulls:
        raise ValueError(f"{where}: not_finite: {min(not_finite - nulls)!r:.100}, expected paths of null numbers")
    fresh = content["fresh_check"]
    if fresh is not None and fresh["eta"] not in [entry["eta"] for entry in content["measured"]]:
        raise ValueError(f"{where}: fresh_check.eta: {fresh['eta']:g}, expected one of those in measured")


@cache
def _validator():
    with third_party("results.json cannot be checked", "what pip install 'dentropy[probe]' brings"):
        from jsonschema import Draft202012Validator

    schema = Path(__file__).with_name("results.schema.json").read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(schema))


def _leaves(content) -> Iterator[tuple[tuple[str, ...], object]]:
    """(path, value) of everything that is no list and no dict."""
    left = [((), content)]  # no recursion: nesting has no limit
    while left:
        path, value = left.pop()
        if isinstance(value, (dict, list)):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            left += [((*path, str(key)), part) for key, part in parts]
        else:
            yield path, value


def _name(field) -> str:
    return ".".join(field) or "content"
