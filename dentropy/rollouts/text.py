"""From text to token ids, and what of a file's text they do not give back.

Text is less than the tokens it was decoded from: dumps leave out special tokens, a tokenizer may write a text back
differently, and nothing says where the sampler cut between tokens. What can be seen of that is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from dentropy.doors import third_party

LOST = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character
WORD = "word"  # stands for a message's content where only what a template puts around it matters


class TextReader:
    """Token ids of the prompts and responses of one file.

    Args:
        tokenizer: a transformers tokenizer; None refuses text.

    Attributes:
        prompts, unmarked: prompts read from plain text, and how many of them have none of the special tokens that
            the tokenizer's chat template writes.
        texts, changed: plain texts read, and how many their token ids do not give back.
        pairs, differing: token ids with text beside them (`compare`), and how many change when decoded and encoded.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.prompts = self.unmarked = self.texts = self.changed = self.pairs = self.differing = 0

    def prompt(self, where: str, text) -> list[int]:
        """Of a prompt: text, behind the tokenizer's start tokens, or chat messages, through its template."""
        self._check_tokenizer(where)
        if isinstance(text, list):
            return self._chat(where, text)
        ids = self._plain(where, text)
        self.prompts += 1
        self.unmarked += bool(self._marks) and not any(mark in text for mark in self._marks)
        starts = self._start_tokens(where, text, ids)
        return ids if ids[: len(starts)] == starts else [*starts, *ids]

    def response(self, where: str, text) -> list[int]:
        """Of a response: text, or the one chat message that it is; without special tokens that the text lacks."""
        self._check_tokenizer(where)
        return self._plain(where, _only_message(where, text) if isinstance(text, list) else text)

    def compare(self, ids: Sequence[int]) -> None:
        """Count token ids that have text beside them: they tell how other text of the file fares."""
        ids = list(map(int, ids))
        self.pairs += 1
        self.differing += self._tokenizer.encode(self._decode(ids), add_special_tokens=False) != ids

    def losses(self) -> list[str]:
        found = []
        if self.unmarked:
            found.append(
                f"{self.unmarked} of {self.prompts} prompts have none of the chat template's special tokens, which "
                "text dumps leave out: a chat policy was sampled after other prompts (prompt_ids or messages keep them)"
            )
        if self.changed:
            found.append(f"{self.changed} of {self.texts} texts are not what their token ids decode to")
        if self.differing:
            found.append(
                f"{self.differing} of {self.pairs} columns of token ids with text beside them change when decoded and "
                "encoded again, as the columns without ids may have"
            )
        return found

    def _check_tokenizer(self, where: str) -> None:
        if self._tokenizer is None:
            raise ValueError(f"{where}: text without a tokenizer, expected token ids or a tokenizer")

    def _plain(self, where: str, text) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"{where}: {type(text).__name__}, expected text")
        ids = self._encode(where, text, add_special_tokens=False)
        self.texts += 1
        self.changed += LOST in text or self._decode(ids) != text
        return ids

    def _encode(self, where: str, text: str, add_special_tokens: bool) -> list[int]:
        with third_party(f"{where}: the tokenizer refuses it", "text that it knows"):
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _chat(self, where: str, messages: list) -> list[int]:
        """A closing message of the assistant is the beginning of the response: it is left open."""
        last = messages[-1] if messages else None
        is_open = isinstance(last, dict) and last.get("role") == "assistant"
        with third_party(f"{where}: the chat template refuses it", "messages it knows (token ids go in prompt_ids)"):
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=not is_open, continue_final_message=is_open, return_dict=False
            )

    def _start_tokens(self, where: str, text: str, ids: list[int]) -> list[int]:
        """What the tokenizer puts before a text; what it puts behind one, an end token say, was never a prompt's."""
        whole = self._encode(where, text, add_special_tokens=True)
        if not ids:  # nothing tells what stands before from what stands behind
            bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
            return whole[: whole.index(bos) + 1] if bos in whole else [token for token in whole if token != eos]
        for start in range(len(whole) - len(ids) + 1):
            if whole[start : start + len(ids)] == ids:
                return whole[:start]
        raise ValueError(f"{where}: the tokenizer's special tokens change the text's own, expected prompt_ids")

    @cached_property
    def _marks(self) -> set[str]:
        return marks(self._tokenizer)


def marks(tokenizer) -> set[str]:
    """Special tokens that the chat template puts around a user's message, the start token aside."""
    around = rendered(tokenizer, [{"role": "user", "content": WORD}], add_generation_prompt=True)
    return {token for token in special_tokens(tokenizer) - {tokenizer.bos_token} if token in around}


def special_tokens(tokenizer) -> set[str]:
    """The tokens that `skip_special_tokens` leaves out."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def rendered(tokenizer, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
    """What the chat template makes of messages; "" without a template and for one that refuses these messages."""
    if not tokenizer.chat_template:
        return ""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception:  # templates are programs of their own, and these messages are ours, not the user's
        return ""


def _only_message(where: str, messages: list) -> object:
    """The text of a completion of one message of the assistant, which holds nothing else."""
    message = messages[0] if len(messages) == 1 and isinstance(messages[0], dict) else {}
    beside = [name for name, value in message.items() if name not in ("role", "content") and value]
    if message.get("role") != "assistant" or beside:
        said = f"an assistant message with {', '.join(beside)}" if beside else f"{len(messages)} messages"
        raise ValueError(f"{where}: {said}, expected one assistant message of text alone, or token ids")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return "".join(str(part.get("text")) for part in parts)
    return content
