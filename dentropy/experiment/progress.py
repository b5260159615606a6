"""Progress of long work on stderr: done of all, tokens per second, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dentropy.passes import ranks

# Seconds before a bar appears: input that is refused at once is not answered with a bar.
DELAY = 0.2


@contextmanager
def token_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` tokens, shown by the first rank; yields a function to call with the number just finished."""
    from tqdm import tqdm

    settings = dict(unit=" tokens", unit_scale=True, leave=False, delay=DELAY, disable=ranks.rank() > 0)
    with tqdm(total=total, desc=label, **settings) as bar:
        yield bar.update


@contextmanager
def rollout_bar(label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar over `total` rollouts whose lengths are not known before: tokens per second stand beside it.

    Yields a function to call with the numbers of rollouts and of tokens just finished.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=" rollouts", leave=False, delay=DELAY) as bar:
        tokens = 0

        def advance(rollouts: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(rollouts)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s" if elapsed > 0 else "")

        yield advance
