"""What reaches the terminal: results on stdout; warnings and errors on stderr, one line each.

Text from files and file names cannot steer the terminal: control characters are written by their code.
"""

from __future__ import annotations

import io
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from dentropy.cli.processes import is_first
from dentropy.doors import is_refusal
from dentropy.experiment.progress import hidden

# Control and format characters (escape, backspace, right-to-left marks, ...), and separators of lines.
STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class Terminal:
    """What a command says, with the words of its command line: they tell which option a message is about."""

    def __init__(self, arguments: Sequence[str]):
        self._words = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        self._warned: Counter[str] = Counter()

    def complain(self, message: object) -> None:
        """An error, in one line; of several processes the first says it, unless it cannot know."""
        if not is_first() and getattr(message, "dentropy_told", True):
            return
        print(f"dentropy: {visible(self._line(message))}", file=sys.stderr)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Warnings come here, each once and at the end those that came again with their count; what the terminal's
        encoding does not have is written by its code."""
        streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
        before = [stream.errors for stream in streams]
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning, append=True)  # repeated ones too: they are counted here
            warnings.showwarning = self._warn
            for stream in streams:
                stream.reconfigure(errors="backslashreplace")
            try:
                yield
            finally:
                for text, times in self._warned.items():
                    if times > 1:
                        print(f"dentropy: warning, {times} times in all: {visible(text)}", file=sys.stderr)
                for stream, errors in zip(streams, before, strict=True):
                    stream.reconfigure(errors=errors)

    def _warn(self, message, category, filename, lineno, file=None, line=None) -> None:
        if not is_first():
            return
        option, name = _options[-1] if _options else ("", "")
        text = self._line(str(message).removeprefix(f"{name}: "))
        if option and not text.startswith("--"):
            text = f"{option}: {text}"
        self._warned[text] += 1
        if self._warned[text] == 1:
            print(f"dentropy: warning: {visible(text)}", file=sys.stderr)

    def _line(self, message: object) -> str:
        """One line; what it says of an argument is said of the option of that name, if that was given."""
        text = " ".join(str(message).split())
        name, colon, rest = text.partition(":")
        option = "--" + name.replace("_", "-")
        return f"{option}:{rest}" if colon and option in self._words else text


def is_bug(error: Exception) -> bool:
    """Whether an error is neither of the input nor of the machine: its traceback is what is needed of it."""
    if isinstance(error, (OSError, MemoryError)):
        return False
    if isinstance(error, RuntimeError):
        from dentropy.model.memory import is_out_of_memory

        return not is_out_of_memory(error)
    return not (isinstance(error, ValueError) and is_refusal(error))


def say(text: str) -> None:
    """A result, on stdout."""
    if is_first():
        print(visible(text), flush=True)


def remark(text: str) -> None:
    """What was understood of an input, on stderr, in one line."""
    if is_first() and not _quiet:
        print(f"dentropy: {visible(' '.join(text.split()))}", file=sys.stderr)


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Where it is wanted, neither remarks nor progress: results, warnings and errors are all that is said."""
    global _quiet
    before, _quiet = _quiet, wanted
    try:
        with hidden() if wanted else nullcontext():
            yield
    finally:
        _quiet = before


@contextmanager
def about(option: str, name: str = "") -> Iterator[None]:
    """Warnings of the calls inside, a library's too, name this option; where another one has the `name` by which these
    calls know its value, so do errors."""
    _options.append((option, name))
    try:
        yield
    except (ValueError, MemoryError) as error:
        if not name:
            raise
        kind = MemoryError if isinstance(error, MemoryError) else ValueError
        raise kind(f"{option}: {str(error).removeprefix(f'{name}: ')}") from error
    finally:
        _options.pop()


def visible(text: str) -> str:
    r"""The text with everything that could steer a terminal written by its code; lines stay lines.

    Example:
        >>> visible("run\x1b[2J")
        'run\\x1b[2J'
    """
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in STEERING else c.encode("unicode_escape").decode() for c in text
    )


_quiet = False
_options: list[tuple[str, str]] = []  # what calls are about now, and its name there, the innermost last
