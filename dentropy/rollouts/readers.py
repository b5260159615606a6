"""Reading rollouts and prompts from JSON lines: token ids where there are some, else text."""

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from pathlib import Path

from dentropy.doors import json_value, regular_file
from dentropy.rollouts import ends
from dentropy.rollouts.masks import cut_masked
from dentropy.rollouts.text import TextReader

PROMPT = ("prompt_ids",), ("prompt", "input")  # columns of token ids, columns of text
RESPONSE = ("response_ids", "completion_ids"), ("response", "completion", "output")
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


def prompts_and_responses(
    rows: list[tuple[str, dict]],
    tokenizer,
    append_eos: bool | str,
    end_tokens: int | Sequence[int] | None,
    max_new_tokens: int | None,
) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """Token ids of all rows, and in words what of the rollouts the file has lost; `PackedBatch.from_jsonl` explains."""
    text = TextReader(tokenizer)
    prompts = [tokens_of(where, row, *PROMPT, text.prompt) for where, row in rows]
    read = [tokens_of(where, row, *RESPONSE, text.response) for where, row in rows]
    from_text = [not has(row, RESPONSE[0]) for _, row in rows]
    responses = [cut_masked(*row, *ids) for row, *ids in zip(rows, prompts, read, from_text, strict=True)]
    masked = sum(map(len, read)) - sum(map(len, responses))
    if text.texts:
        for (_, row), *pair in zip(rows, prompts, read, strict=True):
            for ids, (id_names, text_names) in zip(pair, (PROMPT, RESPONSE), strict=True):
                if has(row, id_names) and has(row, text_names):
                    text.compare(ids)
    known = () if end_tokens is None else ends.as_tuple(end_tokens)
    unknown: list[str] = []
    if any(from_text) and append_eos:
        end = ends.appended_token(tokenizer, known, append_eos)
        known = known or (end,)
        responses, unknown = ends.close(responses, rows, from_text, end, known, max_new_tokens)
    elif any(from_text) and not known and tokenizer.eos_token_id is not None:
        known = (tokenizer.eos_token_id,)
    lost = [*text.losses(), *ends.losses(responses, known, any(from_text)), *unknown]
    return prompts, responses, [*lost, *([f"{masked} masked tokens behind responses were cut off"] if masked else [])]


def has(row: dict, names: tuple[str, ...]) -> bool:
    return any(name in row for name in names)


def tokens_of(
    where: str,
    row: dict,
    id_names: tuple[str, ...],
    text_names: tuple[str, ...],
    encode: Callable[[str, object], list[int]],
) -> list[int]:
    """Token ids of a row's prompt or response: its first column of `id_names`, else what `encode` makes of its text."""
    for name in id_names:
        if name in row:
            ids = row[name]
            if not isinstance(ids, list) or not all(type(t) is int for t in ids):
                raise ValueError(f"{where}: {name}: {ids!r:.40}, expected a list of token ids")
            if ids and not 0 <= min(ids) <= max(ids) <= LARGEST_ID:
                outside = min(ids) if min(ids) < 0 else max(ids)
                raise ValueError(f"{where}: {name}: token id {outside}, expected ids from 0 to 2**63 - 1")
            return ids
    for name in text_names:
        if name in row:
            return encode(f"{where}: {name}", row[name])
    raise ValueError(f"{where}: only {', '.join(row) or 'nothing'}, expected one of {', '.join(id_names + text_names)}")


def column_of(
    path, rows: list[tuple[str, dict]], names: tuple[str, ...], check: Callable[[str, object], None]
) -> list | None:
    """The first of the columns that any line has, each value checked; a line that lacks it is an error."""
    for name in names:
        if any(name in row for _, row in rows):
            for where, row in rows:
                if row.get(name) is None:
                    raise ValueError(f"{where}: no {name}, expected one as in other lines of {path}")
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
