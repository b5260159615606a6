"""dentropy show."""

from __future__ import annotations

import json

from dentropy.cli.terminal import say


def add(commands) -> None:
    command = commands.add_parser("show", help="print the summary of a finished run")
    command.add_argument("folder", metavar="DIR", help="run folder")
    command.add_argument("--json", action="store_true", help="print what results.json holds, in ASCII")
    command.set_defaults(run=run)


def run(options) -> None:
    from dentropy.experiment.run_folder import load
    from dentropy.experiment.summary import summary

    content = load(options.folder)
    # Of ASCII's control characters JSON leaves DEL as it is.
    say(json.dumps(content, indent=2).replace("\x7f", "\\u007f") if options.json else summary(content))
