"""Progress of long work on stderr: done of all, tokens per second, time left.

On a terminal a bar that moves; elsewhere, in a log, a line now and then. Of several ranks the first shows it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds before a bar appears: input that is refused at once is not answered with a bar.
DELAY = 0.2
BETWEEN_LINES = 30  # seconds

_hidden = False


@contextmanager
def hidden() -> Iterator[None]:
    """No progress is shown by what runs inside."""
    global _hidden
    before, _hidden = _hidden, True
    try:
        yield
    finally:
        _hidden = before


@contextmanager
def token_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` tokens; yields a function to call with the number of tokens just finished."""
    with _bar(label, total, unit=" tokens", unit_scale=True) as bar:
        yield bar.update


@contextmanager
def rollout_bar(label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar over `total` rollouts whose lengths are not known before: tokens per second stand beside it.

    Yields a function to call with the numbers of rollouts and of tokens just finished.
    """
    with _bar(label, total, unit=" rollouts") as bar:
        tokens = 0

        def advance(rollouts: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s" if elapsed > 0 else "", refresh=False)
            bar.update(rollouts)

        yield advance


def _bar(label: str, total: int, **settings):
    from tqdm import tqdm

    from dentropy.passes import ranks

    settings |= dict(total=total, desc=label, leave=False, disable=_hidden or ranks.rank() > 0)
    if sys.stderr.isatty():
        return tqdm(delay=DELAY, **settings)
    return tqdm(delay=BETWEEN_LINES, mininterval=BETWEEN_LINES, maxinterval=BETWEEN_LINES, file=_Lines(), **settings)


class _Lines:
    """What a bar writes to redraw itself, as lines of their own on stderr."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
