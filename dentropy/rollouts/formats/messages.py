"""{"messages": [...]}: a conversation, whose last message is the assistant's and what was sampled."""

from __future__ import annotations

import warnings

from dentropy.rollouts.files import Rows
from dentropy.rollouts.formats import plain
from dentropy.rollouts.formats.fields import source
from dentropy.rollouts.formats.format import Asked, Format


def plain_rows(rows: Rows, asked: Asked) -> Rows:
    found = [(where, _row(where, row)) for where, row in plain.plain_rows(rows, asked)]
    earlier = sum(any(message["role"] == "assistant" for message in row["prompt"]) for _, row in found)
    if earlier:
        warnings.warn(
            f"{source(rows)}: {earlier} of {len(rows)} conversations have earlier messages of the assistant, which "
            "count as given (token_ids and loss_mask say which tokens were generated)",
            stacklevel=2,
        )
    return found


def _row(where: str, row: dict) -> dict:
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{where}: messages: {messages!r:.40}, expected at least two messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: messages: {message!r:.40}, expected messages with a role")
    kept = {name: value for name, value in row.items() if name != "messages"}
    return kept | {"prompt": messages[:-1], "response": messages[-1:]}


FORMAT = Format("conversations ({'messages': ...})", ("messages",), plain_rows, temperature=1.0)
