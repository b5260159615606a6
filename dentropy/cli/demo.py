"""dentropy demo."""

from __future__ import annotations

from dataclasses import replace

from dentropy.cli.keeping import finish, free
from dentropy.cli.options import load_libraries
from dentropy.demo import SEED

FOLDER = "dentropy-demo"


def add(commands) -> None:
    command = commands.add_parser("demo", help="the whole experiment on a small policy that comes with the package")
    command.add_argument("--out", metavar="DIR", help=f"run folder (default: the first free {FOLDER}-N)")
    command.add_argument("--seed", type=int, default=SEED, help="seed of all sampling (default: %(default)s)")
    command.set_defaults(run=run)


def run(options) -> None:
    from dentropy.demo.run import load_tokenizer, run
    from dentropy.experiment.run_folder import check_out

    check_out(options.out or free(FOLDER))
    load_libraries()
    result = run(seed=options.seed)
    # Chosen only now: another demo may have taken the number meanwhile.
    finish(replace(result, command=options.command), options.out or free(FOLDER), load_tokenizer())
