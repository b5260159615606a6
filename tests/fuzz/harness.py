"""Reads many mangled inputs of one format: each is read clean or refused in one line that names it."""

import signal
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from dentropy.doors import is_refusal

SECONDS = 20  # for one input: far more than any needs, also on a busy machine


@dataclass(frozen=True)
class Format:
    """One kind of input.

    Attributes:
        count: How many inputs are tried.
        make: Writes one into the folder, by the generator; its path.
        read: Reads it, as a user's call would.
        forbidden: Why what was read should have been refused, by rules of its own; None where it is allowed.
        argument: What an error may begin with in place of the file: the command names the option then.
        permitted: Whether a refused file should have been read, where there are rules for that.
    """

    count: int
    make: Callable[[Path, Random], Path]
    read: Callable[[Path], object]
    forbidden: Callable[[Path, object], str | None]
    permitted: Callable[[Path], bool] = lambda path: False
    argument: str | None = None


def run(form: Format, folder: Path, seed: int = 0) -> Counter:
    """How many inputs were read and how many refused; AssertionError with the first fault of each kind."""
    counts, faults = Counter(), {}
    for index in range(form.count):
        path = form.make(folder, Random(f"{seed}.{index}"))
        outcome, fault = _outcome(form, path)
        counts[outcome] += 1
        if fault is not None:
            faults.setdefault(fault[:80], f"input {index}: {fault}")
    assert not faults, "\n".join(faults.values())
    return counts


def _outcome(form: Format, path: Path) -> tuple[str, str | None]:
    before = sorted(path.parent.rglob("*"))
    try:
        with warnings.catch_warnings(), limited():
            warnings.simplefilter("ignore")
            value = form.read(path)
    except (ValueError, OSError, MemoryError) as error:
        said = str(error)
        if isinstance(error, ValueError) and not is_refusal(error):
            return "refused", f"not refused but failed: {error!r}"
        named = path.name in said or (form.argument is not None and said.startswith(form.argument))
        if not named or "\n" in said:
            return "refused", f"does not name {path.name} in one line: {said!r}"
        return "refused", f"refused, though the format allows it: {said}" if form.permitted(path) else None
    except (Exception, HangsError) as error:
        return "failed", f"traceback: {error!r:.300}"
    if sorted(path.parent.rglob("*")) != before:
        return "read", "reading left files behind"
    why = form.forbidden(path, value)
    return "read", None if why is None else f"accepted, though {why}"


class HangsError(BaseException):
    """No Exception: nothing that guards a library may take it for that library's."""


@contextmanager
def limited():
    def late(*_):
        raise HangsError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
