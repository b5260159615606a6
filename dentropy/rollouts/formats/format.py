"""What a format is, and what a caller has to say beside a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dentropy.rollouts.files import Rows


@dataclass(frozen=True)
class Asked:
    """What files do not say; `dentropy.rollouts.reading.read_rollouts` explains each."""

    tokenizer: object = None
    append_eos: bool | str = False
    end_tokens: int | Sequence[int] | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    reward: str | None = None


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as the user is told.
        columns: a row that has all of them is of this format.
        plain_rows: (rows, asked) -> rows of `prompt_ids`, `response_ids` (or text, by the names of dentropy's own
            files) or of `token_ids` and `loss_mask`, with `group`, `reward`, `advantage`, `sampler_logp`,
            `temperature` and `step` where the file says them. `advantage` is a number, or one per generated token.
        shards: whether the files of a folder are parts of one step, not steps.
        temperature: that of files that do not say it; None where it has to be asked for.
    """

    name: str
    columns: tuple[str, ...]
    plain_rows: Callable[[Rows, Asked], Rows]
    shards: bool = False
    temperature: float | None = None
