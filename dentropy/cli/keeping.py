"""What was computed is printed and written, and kept elsewhere where it cannot be written as it was asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from dentropy.cli.terminal import say


def finish(result, out: str | Path, tokenizer) -> None:
    """Print the summary of a ProbeResult and write its run folder: whatever becomes of the one, the other is done."""
    from dentropy.experiment.run_folder import ViewsFailedError

    try:
        say(result.summary())
    finally:
        try:
            folder = write_or_keep(lambda path: result.save(path, tokenizer), Path(out), "dentropy-run")
        except ViewsFailedError as error:
            if isinstance(error.__cause__, OSError):
                raise OSError(str(error)) from error
            raise
    say(f"\nFiles in {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))


def write_or_keep(write: Callable[[Path], Path], out: Path, name: str, suffix: str = "") -> Path:
    """`write(out)`; where that fails, at a free `name`-N beside `out`, or else among the system's temporary files.

    Raises:
        ValueError: Why `out` could not be written, and where it is instead.
    """
    try:
        return write(out)
    except (OSError, ValueError) as error:
        failed = error
    reason = str(failed) if isinstance(failed, ValueError) else f"--out: {out} cannot be written ({failed})"
    for folder in (out.absolute().parent, Path(tempfile.gettempdir())):
        try:
            kept = write(free(folder / name, suffix))
        except (OSError, ValueError):
            continue
        raise ValueError(f"{reason}; what was computed is in {kept}") from failed
    raise ValueError(f"{reason}; nor is there another place to write what was computed") from failed


def free(name: str | Path, suffix: str = "") -> Path:
    """The first of name-1, name-2, … that is free, the suffix behind it."""
    number = 1
    while Path(f"{name}-{number}{suffix}").exists():
        number += 1
    return Path(f"{name}-{number}{suffix}")
