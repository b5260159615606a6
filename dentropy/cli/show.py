"""dentropy show."""

from __future__ import annotations

from dentropy.cli.terminal import say


def add(commands) -> None:
    command = commands.add_parser("show", help="print the summary of a finished run")
    command.add_argument("folder", metavar="DIR", help="run folder")
    command.set_defaults(run=run)


def run(options) -> None:
    from dentropy.experiment.run_folder import load
    from dentropy.experiment.summary import summary

    say(summary(load(options.folder)))
