"""Reading rollouts and prompts from JSON lines: token ids where there are some, text where there is a tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path


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


def tokens_of(
    where: str,
    row: dict,
    id_names: tuple[str, ...],
    text_names: tuple[str, ...],
    tokenizer,
    *,
    is_prompt: bool,
    append_eos: bool = False,
) -> list[int]:
    """Token ids of a row's prompt or response: its first column of `id_names`, else the text of `text_names`."""
    for name in id_names:
        if name in row:
            ids = row[name]
            if not isinstance(ids, list) or not all(type(t) is int for t in ids):
                raise ValueError(f"{where}: {name}: {ids!r:.40}, expected a list of token ids")
            return ids
    for name in text_names:
        if name in row:
            if tokenizer is None:
                raise ValueError(f"{where}: {name}: text without a tokenizer, expected token ids or a tokenizer")
            return _encode(f"{where}: {name}", row[name], tokenizer, is_prompt, append_eos)
    raise ValueError(f"{where}: only {', '.join(row) or 'nothing'}, expected one of {', '.join(id_names + text_names)}")


def _encode(where: str, text, tokenizer, is_prompt: bool, append_eos: bool) -> list[int]:
    """Token ids of a prompt (text or chat messages, with start tokens) or of a response (text, without)."""
    if is_prompt and isinstance(text, list):
        try:
            return tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{where}: the chat template refuses it ({error}), expected messages (or prompt_ids)"
            ) from error
    if not isinstance(text, str):
        raise ValueError(f"{where}: {type(text).__name__}, expected text")
    starts = is_prompt and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    try:
        ids = tokenizer.encode(text, add_special_tokens=starts)
    except Exception as error:  # the tokenizers library raises no narrower kind, for a character it lacks, say
        raise ValueError(f"{where}: the tokenizer refuses it ({error}), expected text that it knows") from error
    if append_eos:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{where}: append_eos with a tokenizer that has no end token, expected one that has")
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def column_of(path, rows: list[tuple[str, dict]], names: tuple[str, ...]) -> list | None:
    """The first of the columns that any line has; a line that lacks it is an error."""
    for name in names:
        if any(name in row for _, row in rows):
            for where, row in rows:
                if row.get(name) is None:
                    raise ValueError(f"{where}: no {name}, expected one as in other lines of {path}")
            return [row[name] for _, row in rows]
    return None
