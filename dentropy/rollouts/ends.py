"""How responses end: with one of the policy's end tokens, cut off at a cap, or stripped of it by a text dump."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dentropy.rollouts.text import WORD, rendered, special_tokens


def as_tuple(ids: int | Sequence[int]) -> tuple[int, ...]:
    return (ids,) if isinstance(ids, int) else tuple(ids)


def appended_token(tokenizer, end_tokens: tuple[int, ...], append_eos: bool | str) -> int:
    """The token id to put behind a response given as text: the one named, or the only one it can have been.

    Among several, the one that the chat template ends the assistant's turns with. A tokenizer alone does not say what
    its policy ends with: where it has special tokens for more than start, padding and the unknown, it has to be asked.

    Raises:
        ValueError: where that leaves none or several.
    """
    if isinstance(append_eos, str):
        token = tokenizer.convert_tokens_to_ids(append_eos)
        if token is None or (token == tokenizer.unk_token_id and append_eos != tokenizer.unk_token):
            raise ValueError(f"append_eos: {append_eos!r} is no token of the tokenizer, expected an end token")
        return token
    turn_end = _turn_end(tokenizer)
    if end_tokens:
        if len(end_tokens) == 1:
            return end_tokens[0]
        if turn_end in end_tokens:
            return turn_end
        several = [repr(tokenizer.convert_ids_to_tokens(token)) for token in end_tokens]
    elif tokenizer.eos_token_id is None:
        raise ValueError("append_eos: the tokenizer has no end token, expected end_tokens or the token itself")
    else:
        named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
        others = special_tokens(tokenizer) - named
        if turn_end == tokenizer.eos_token_id or (turn_end is None and not others):
            return tokenizer.eos_token_id
        several = [repr(token) for token in (tokenizer.eos_token, *sorted(others)[:3])]
    raise ValueError(
        f"append_eos: responses may have ended with {' or '.join(several)}, expected the token itself "
        "(append_eos='TOKEN', --append-eos TOKEN), or end_tokens, one of them"
    )


def close(
    responses: list[list[int]],
    rows: list[tuple[str, dict]],
    from_text: list[bool],
    end: int,
    ends: tuple[int, ...],
    max_new_tokens: int | None,
) -> tuple[list[list[int]], list[str]]:
    """Responses, those given as text with their end token: but for one that has it, and one that was cut off before.

    Returns:
        The responses, and in words whether some may have been cut off without its being known.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens}, expected at least 1")
    closed, lengths = [], []
    for ids, (_, row), is_text in zip(responses, rows, from_text, strict=True):
        capped = max_new_tokens is not None and len(ids) >= max_new_tokens
        if not is_text or capped or row.get("finish_reason") == "length" or (ids and ids[-1] in ends):
            closed.append(ids)
        else:
            closed.append([*ids, end])
            if max_new_tokens is None and row.get("finish_reason") is None:
                lengths.append(len(ids))
    longest = max(lengths, default=0)
    n = lengths.count(longest)
    if n < 2:
        return closed, []
    return closed, [
        f"{n} responses share the longest length, {longest} tokens: if sampling was cut off there, they had no end "
        "token and now have one (max_new_tokens, --max-new-tokens says where it was cut off)"
    ]


def losses(responses: Sequence[np.ndarray], ends: tuple[int, ...], from_text: bool) -> list[str]:
    """What the end tokens of responses, or their absence, say against a file."""
    if not ends:
        return []
    found = []
    named = f"the end token {ends[0]}" if len(ends) == 1 else f"one of the end tokens {', '.join(map(str, ends))}"
    if not any(len(ids) and ids[-1] in ends for ids in responses):
        found.append(
            f"no response ends with {named}"
            + (", which text dumps leave out (append_eos, --append-eos puts it back)" if from_text else "")
            + ": entropy and slope then miss every decision to stop"
        )
    n = sum(any((ids[:-1] == token).any() for token in ends) for ids in responses)
    if n:
        found.append(f"{n} of {len(responses)} responses go on after an end token: padding, or several turns")
    return found


def _turn_end(tokenizer) -> int | None:
    """The first special token that the chat template puts behind what the assistant says."""
    conversation = [{"role": "user", "content": WORD}, {"role": "assistant", "content": WORD}]
    _, _, behind = rendered(tokenizer, conversation).rpartition(WORD)
    at = {token: behind.find(token) for token in special_tokens(tokenizer) if token in behind}
    return tokenizer.convert_tokens_to_ids(min(at, key=at.get)) if at else None
