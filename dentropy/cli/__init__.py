# PYTHON_ARGCOMPLETE_OK
"""The command line: dentropy demo, probe, replay, sample and show, one file each.

It may import everything; heavy packages load inside the commands that need them. Bad input ends with exit code 2 and
one line on stderr.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from dentropy import __version__
from dentropy.cli import demo, probe, replay, sample, show
from dentropy.cli.command_line import Parser
from dentropy.cli.processes import Terminated, count
from dentropy.cli.terminal import Terminal, is_bug, quiet

INTERRUPTED, TERMINATED = 130, 143  # as a shell says it of a command ended by Ctrl-C, or by SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words behind `dentropy`; None means those of the command line.

    Returns:
        The exit code: 0; 2 for bad input, for rollouts too long for the memory there is and for what could not be
        written where it was asked for; 130 after Ctrl-C, 143 after SIGTERM. What is none of these is a bug, and raised.
    """
    given = sys.argv[1:] if argv is None else argv
    # argparse takes -1e-6 for an option; behind a space it is a value, and float() does not mind the space.
    arguments = [f" {argument}" if _is_negative_number(argument) else argument for argument in given]
    terminal = Terminal(arguments)
    with terminal.open():
        try:
            commands = parser()
            if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
                import argcomplete

                argcomplete.autocomplete(commands)
            options = commands.parse_args(arguments)
            options.command, options.terminal = shlex.join(["dentropy", *given]), terminal
            if count() > 1 and options.run is not probe.run:
                raise ValueError(
                    f"{arguments[0]}: started in {count()} processes, expected one (probe alone runs in more)"
                )
            with quiet(options.quiet):
                options.run(options)
        except KeyboardInterrupt as error:
            terminal.complain(str(error) or "interrupted")
            return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        except Exception as error:
            if is_bug(error):
                raise
            terminal.complain(error)
            return 2
    return 0


def parser() -> Parser:
    """The parser of all commands; what it makes of a command line has the command to call in `run`."""
    top = Parser(prog="dentropy", description="What a weight update does to a language-model policy's entropy.")
    top.add_argument("--version", action="version", version=f"dentropy {__version__}")
    commands = top.add_subparsers(required=True, metavar="{demo,probe,replay,sample,show}")
    for command in (demo, probe, replay, sample, show):
        command.add(commands)
    for command in commands.choices.values():
        command.add_argument("--quiet", action="store_true", help="no progress: results, warnings and errors only")
    return top


def _is_negative_number(argument: str) -> bool:
    try:
        return argument.startswith("-") and float(argument) == float(argument)
    except ValueError:
        return False
