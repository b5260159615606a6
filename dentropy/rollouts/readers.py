"""Reading rollouts and prompts from JSON lines: token ids where there are some, text where there is a tokenizer."""

import codecs
import sys
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path

from dentropy.doors import json_value, regular_file, third_party

LARGEST_ID = 2**63 - 1
# By what a file begins with; the marks of UTF-32 begin with those of UTF-16.
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) for every line that is not blank."""
    regular_file(path, "a file of JSON lines")
    if path.suffix == ".parquet":
        raise ValueError(
            f"{path}: a Parquet file, expected JSON lines; "
            "pandas.read_parquet(...).to_json(..., orient='records', lines=True) makes them"
        )
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}: line {number}"
            line = _text(raw, where, first=number == 1)
            if not line.strip():
                continue
            row = json_value(line, where)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a JSON {type(row).__name__}, expected an object")
            yield where, row


def _text(raw: bytes, where: str, first: bool) -> str:
    if first:
        raw = raw.removeprefix(codecs.BOM_UTF8)
        for mark, encoding in OTHER_ENCODINGS.items():
            if raw.startswith(mark):
                raise ValueError(f"{where}: {encoding} text, expected UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}), expected UTF-8 text") from error


def tokens_of(where, row, id_names, text_names, tokenizer, is_prompt, append_eos) -> list[int]:
    for name in id_names:
        if name in row:
            ids = row[name]
            if not isinstance(ids, list) or not all(type(t) is int for t in ids):
                raise ValueError(f"{where}: {name} is not a list of token ids")
            if ids and not 0 <= min(ids) <= max(ids) <= LARGEST_ID:
                outside = min(ids) if min(ids) < 0 else max(ids)
                raise ValueError(f"{where}: {name}: token id {outside}, expected ids from 0 to 2**63 - 1")
            return ids
    for name in text_names:
        if name in row:
            if tokenizer is None:
                raise ValueError(f"{where}: {name} is text, which needs a tokenizer")
            return _encode(f"{where}: {name}", row[name], tokenizer, is_prompt, append_eos)
    raise ValueError(f"{where}: none of {', '.join(id_names + text_names)} is there")


def _encode(where: str, text, tokenizer, is_prompt: bool, append_eos: bool) -> list[int]:
    """Token ids of a prompt (text or chat messages, with start tokens) or of a response (text, without)."""
    if is_prompt and isinstance(text, list):
        with third_party(f"{where}: the chat template refuses it", "messages it knows (token ids go in prompt_ids)"):
            return tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False)
    if not isinstance(text, str):
        raise ValueError(f"{where} is {type(text).__name__}, expected text")
    starts = is_prompt and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    with third_party(f"{where}: the tokenizer refuses it", "text that it knows"):
        ids = tokenizer.encode(text, add_special_tokens=starts)
    if append_eos:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{where}: append_eos is set, but the tokenizer has no end token")
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def column_of(
    path, rows: list[tuple[str, dict]], names: tuple[str, ...], check: Callable[[str, object], None]
) -> list | None:
    """The first of the columns that any line has, each value checked; a line that lacks it is an error."""
    for name in names:
        if any(name in row for _, row in rows):
            for where, row in rows:
                if row.get(name) is None:
                    raise ValueError(f"{where}: no {name}, though other lines of {path} have one")
                check(f"{where}: {name}", row[name])
            return [row[name] for _, row in rows]
    return None


def check_number(where: str, value) -> None:
    if not is_number(value):
        raise ValueError(f"{where}: {value!r:.40}, expected a finite number")


def check_reward(where: str, value) -> None:
    """A number, or whether an answer was right."""
    if not isinstance(value, bool):
        check_number(where, value)


def check_label(where: str, value) -> None:
    """A group label; several rollouts with NaN would be one group, or none would be."""
    if isinstance(value, bool) or not (isinstance(value, (int, str)) or is_number(value)):
        raise ValueError(f"{where}: {value!r:.40}, expected an integer or text")


def is_number(value) -> bool:
    """Whether float64 holds it: no bool, no NaN, no integer of 400 digits."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
