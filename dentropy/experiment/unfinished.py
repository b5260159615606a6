"""Names of files and folders that are still being written, and what is left under them by processes that died."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path
from secrets import token_hex

HOST = re.sub("[^A-Za-z0-9]", "", socket.gethostname())[:32]


def temporary(folder: Path) -> Path:
    """A free path in `folder`, after the removal of those there whose process on this machine is dead."""
    remove_left_behind(folder)
    return folder / f".dentropy-{HOST}-{os.getpid()}-{token_hex(4)}.unfinished"


def remove_left_behind(folder: Path) -> None:
    """Remove what dead processes of this machine have left in `folder` under a temporary name."""
    for path in folder.glob(f".dentropy-{HOST}-*.unfinished"):
        process = path.name.split("-")[2]
        if not process.isdigit() or _runs(int(process)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere the question itself can end a process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True
