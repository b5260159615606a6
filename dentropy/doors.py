"""What comes from outside passes here: regular files, JSON, torch.save's, and the work of libraries on a user's files.

A library can fail in any way, so what is guarded is a step, not a list of errors: whatever is raised there is a
ValueError of one line. An error of dentropy's own is left as it is.
"""

import dis
import json
import traceback
import zipfile
from pathlib import Path

LONGEST_REASON = 600  # characters


class third_party:
    """Guards one call into a library: what it raises becomes a ValueError "failed (why), expected ...".

    The deepest frame tells a library's failure from one of our own code that the library calls back: the latter passes
    as it is, as do MemoryError, PyTorch's own form of it, and what is no Exception.

    Args:
        failed: What is guarded, as "argument: what cannot be done".
        expected: What should have been there.

    Example:
        >>> with third_party("settings: not JSON", "an object"):
        ...     json.loads("{")
        Traceback (most recent call last):
        ValueError: settings: not JSON (Expecting property name enclosed in double quotes: ...), expected an object
    """

    def __init__(self, failed: str, expected: str):
        self._failed, self._expected = failed, expected

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, found) -> None:
        if not isinstance(error, Exception) or isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError":
            return
        frames = [frame for frame, _ in traceback.walk_tb(found)]
        # Comprehensions are frames of their own in Python 3.11.
        called = [frame for frame in frames[1:] if not frame.f_code.co_name.startswith("<")]
        if called and _is_ours(called[-1]):
            return
        raise ValueError(f"{self._failed} ({reason(error)}), expected {self._expected}") from error


def reason(error: BaseException) -> str:
    """An error in one line; its kind too, where that is no mere ValueError or OSError."""
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, OSError)) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " ..."


def is_refusal(error: BaseException) -> bool:
    """Whether dentropy raised the error itself, on purpose; else it came out of a call, and is a bug."""
    *_, last = _entries(error)
    instruction = last.tb_frame.f_code.co_code[last.tb_lasti]
    return _is_ours(last.tb_frame) and dis.opname[instruction] == "RAISE_VARARGS"


def regular_file(path: str | Path, expected: str, argument: str = "") -> Path:
    """`path`, if it is a regular file; ValueError for a folder, a pipe, a device (which may never end) and nothing."""
    path = Path(path)
    if path.is_file():
        return path
    found = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "no such file"
    raise ValueError(f"{argument}{argument and ': '}{path}: {found}, expected {expected}")


def json_value(text: str | bytes, where: str, expected: str = "an object"):
    """The value of a JSON text, UTF-8 where it is bytes; ValueError for what is none, or is nested too deep to read."""
    with third_party(f"{where}: broken JSON", expected):
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)


def saved_by_torch(path: str | Path, expected: str, argument: str = ""):
    """What torch.save wrote, tensors on the CPU, without running anything that a pickle could name.

    ValueError for what it did not write, for its older form, and for more than tensors, numbers, text and containers.
    """
    import torch

    where = f"{argument}{argument and ': '}{regular_file(path, expected, argument)}"
    if not zipfile.is_zipfile(path):  # the older form is read by another, more trusting path
        raise ValueError(f"{where}: not a file of torch.save, expected {expected}")
    with third_party(f"{where}: cannot be read", expected):
        return torch.load(path, map_location="cpu", weights_only=True)


def _entries(error: BaseException):
    entry = error.__traceback__
    while entry is not None:
        yield entry
        entry = entry.tb_next


def _is_ours(frame) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]
