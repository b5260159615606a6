"""Prompts whose special tokens a text dump has left out, rebuilt with the chat template.

Which conversation a text came from is found by rendering conversations of placeholders, leaving out what the dump left
out, and matching the text against what is between them. A text that no conversation makes, or several do, is refused;
where the template writes nothing but special tokens between messages, the text is one message of the user.
"""

from __future__ import annotations

import re
from functools import cached_property

from dentropy.doors import third_party
from dentropy.rollouts.text import marks, rendered, special_tokens

PLACES = ("FIRSTPLACE", "SECONDPLACE", "THIRDPLACE", "FOURTHPLACE")  # stand for the contents of messages
SHAPES = (("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))


class LostTemplate:
    """The chat template of one tokenizer, against texts that `skip_special_tokens` went through."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def is_lost(self, text: str) -> bool:
        """Whether the template writes special tokens, and the text has none of them."""
        return bool(self._marks) and not any(mark in text for mark in self._marks)

    def rebuilt(self, where: str, text: str) -> list[int]:
        """The token ids of the one conversation that gives this text.

        Raises:
            ValueError: where none does or several do.
        """
        found = {tuple(ids) for messages in self._readings(text) if (ids := self._ids(messages, text)) is not None}
        if len(found) == 1:
            return list(found.pop())
        raise ValueError(
            f"{where}: the chat template's tokens are lost, and {len(found) or 'no'} conversations give this text, "
            "expected one (token ids keep them)"
        )

    @cached_property
    def _marks(self) -> set[str]:
        return marks(self._tokenizer)

    @cached_property
    def _patterns(self) -> list[tuple[tuple[str, ...], re.Pattern]]:
        patterns, special = [], sorted(special_tokens(self._tokenizer), key=len, reverse=True)
        for roles in SHAPES:
            text = re.sub("|".join(map(re.escape, special)), "", self._rendered(roles))
            parts = re.split("|".join(PLACES), text)
            # Else the template leaves a message out, or writes one twice, or nothing in the text tells of several.
            if len(parts) == len(roles) + 1 and all(part.strip() for part in parts[1:-1]):
                patterns.append((roles, re.compile("([\\s\\S]*)".join(map(re.escape, parts)))))
        return patterns

    def _readings(self, text: str):
        """Conversations that may have given the text."""
        for roles, pattern in self._patterns:
            for contents in _all_matches(pattern, text):
                yield [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]

    def _ids(self, messages: list[dict], text: str) -> list[int] | None:
        """Those of a conversation, where they give the text back."""
        whole = rendered(self._tokenizer, messages, add_generation_prompt=True)
        if not whole:
            return None
        with third_party("the chat template refuses a conversation", "one it knows"):
            ids = list(self._tokenizer.encode(whole, add_special_tokens=False))
        return ids if self._stripped(ids) == text else None

    def _rendered(self, roles: tuple[str, ...]) -> str:
        messages = [{"role": role, "content": place} for role, place in zip(roles, PLACES)]
        return rendered(self._tokenizer, messages, add_generation_prompt=True)

    def _stripped(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _all_matches(pattern: re.Pattern, text: str) -> list[tuple[str, ...]]:
    """Groups of the ways in which the whole text matches: the longest first groups, and the shortest."""
    greedy = pattern.fullmatch(text)
    if greedy is None:
        return []
    lazy = re.compile(pattern.pattern.replace("[\\s\\S]*", "[\\s\\S]*?")).fullmatch(text)
    return list(dict.fromkeys([greedy.groups(), lazy.groups()]))
