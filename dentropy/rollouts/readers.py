"""Reading rollouts and prompts from JSON lines: token ids where there are some, else text."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dentropy.rollouts import ends
from dentropy.rollouts.masks import cut_masked
from dentropy.rollouts.text import TextReader

PROMPT = ("prompt_ids",), ("prompt", "input")  # columns of token ids, columns of text
RESPONSE = ("response_ids", "completion_ids"), ("response", "completion", "output")


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) for every line that is not blank."""
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}, expected a file of JSON lines")
    if path.suffix == ".parquet":
        raise ValueError(
            f"{path}: a Parquet file, expected JSON lines; "
            "pandas.read_parquet(...).to_json(..., orient='records', lines=True) makes them"
        )
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number}: not UTF-8 ({error}), expected UTF-8 text") from error
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: broken JSON ({error}), expected an object") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a JSON {type(row).__name__}, expected an object")
            yield where, row


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
            return ids
    for name in text_names:
        if name in row:
            return encode(f"{where}: {name}", row[name])
    raise ValueError(f"{where}: only {', '.join(row) or 'nothing'}, expected one of {', '.join(id_names + text_names)}")


def column_of(path, rows: list[tuple[str, dict]], names: tuple[str, ...]) -> list | None:
    """The first of the columns that any line has; a line that lacks it is an error."""
    for name in names:
        if any(name in row for _, row in rows):
            for where, row in rows:
                if row.get(name) is None:
                    raise ValueError(f"{where}: no {name}, expected one as in other lines of {path}")
            return [row[name] for _, row in rows]
    return None
