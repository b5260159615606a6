"""The command line: dentropy demo, probe, sample and show, one file each.

It may import everything; heavy packages load inside the commands that need them. Bad input ends with exit code 2 and
one line on stderr.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dentropy import __version__
from dentropy.cli import demo, probe, sample, show

INTERRUPTED = 130  # as a shell says it of a command ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words behind `dentropy`; None means those of the command line.

    Returns:
        The exit code: 0; 2 for bad input, for rollouts too long for the memory there is and for what could not be
        written where it was asked for; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else argv
    # argparse takes -1e-6 for an option; behind a space it is a value, and float() does not mind the space.
    arguments = [f" {argument}" if _is_negative_number(argument) else argument for argument in arguments]
    with _terminal():
        try:
            options = parser().parse_args(arguments)
            options.run(options)
        except KeyboardInterrupt:
            print("dentropy: interrupted", file=sys.stderr)
            return INTERRUPTED
        except (ValueError, OSError, MemoryError) as error:
            print(f"dentropy: {_one_line(error)}", file=sys.stderr)
            return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it makes of a command line has the command to call in `run`."""
    top = _Parser(prog="dentropy", description="What a weight update does to a language-model policy's entropy.")
    top.add_argument("--version", action="version", version=f"dentropy {__version__}")
    commands = top.add_subparsers(required=True, metavar="{demo,probe,sample,show}")
    for command in (demo, probe, sample, show):
        command.add(commands)
    return top


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line; the usage is in --help."""

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


@contextmanager
def _terminal() -> Iterator[None]:
    """Warnings are one line each, and what the terminal's encoding does not have is written by its code."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        for stream in streams:
            stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            for stream, errors in zip(streams, before, strict=True):
                stream.reconfigure(errors=errors)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"dentropy: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _is_negative_number(argument: str) -> bool:
    try:
        return argument.startswith("-") and float(argument) == float(argument)
    except ValueError:
        return False
