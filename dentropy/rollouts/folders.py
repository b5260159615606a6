"""Which files of a folder hold the rollouts of one policy.

Trainers write a file or a folder for each step, some divide a step among ranks or tasks. Rollouts of several steps
were sampled by several policies, so one step has to be chosen; files of one step are put together in order.
"""

from __future__ import annotations

import re
from pathlib import Path

from dentropy.rollouts.files import SUFFIXES

WITHIN_A_RUN = ("completions", "token_exports", "rollout")  # where TRL, prime-rl and AReaL put them
LISTED = 8


def files_of(path: Path, step: int | None) -> list[Path]:
    """The file `path`, or the files of the folder `path`, of its step `step` where it has one folder for each.

    Raises:
        ValueError: for a folder without such files, one with several steps, and one still being written to.
    """
    if not path.is_dir():
        return [path]
    for name in WITHIN_A_RUN:
        if (path / name).is_dir():
            return files_of(path / name, step)
    files = sorted((file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file()), key=in_order)
    files = [
        file for file in files if re.search(r"_rollouts_\d+$", file.stem)
    ] or files  # beside open-instruct's others
    if files:
        if any(re.fullmatch(r"rank_\d+", file.stem) for file in files) and not (path / "STABLE").exists():
            raise ValueError(f"{path}: no file STABLE beside the ranks, expected a step that prime-rl has finished")
        return files
    folders = sorted((below for below in path.iterdir() if below.is_dir() and any(below.iterdir())), key=in_order)
    if not folders:
        raise ValueError(f"{path}: a folder without {', '.join(SUFFIXES)} files, expected rollouts")
    return files_of(one_of(path, folders, step), step)


def one_of(path: Path, places: list[Path], step: int | None) -> Path:
    """The only place, or the one of this step: the last number of a name says which."""
    if step is not None:
        places = [place for place in places if number(place) == step] or places
    if len(places) == 1:
        return places[0]
    named = [place.name for place in places[:LISTED]] + ["..."] * (len(places) > LISTED)
    raise ValueError(
        f"{path}: {len(places)} steps or sources, each sampled by a policy of its own, choose one: {', '.join(named)}"
    )


def number(place: Path) -> int | None:
    found = re.findall(r"\d{1,18}", place.stem)
    return int(found[-1]) if found else None


def in_order(place: Path) -> tuple:
    """By the numbers in a name, not by their digits: 9 before 10."""
    return [int(part) if part.isdigit() else -1 for part in re.split(r"(\d{1,18})", place.name)], place.name
