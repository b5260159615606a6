"""Reading rollouts and prompts from JSON lines: token ids where there are some, else text."""

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dentropy.doors import json_value, regular_file
from dentropy.large import Tape
from dentropy.rollouts import ends
from dentropy.rollouts.masks import cut_masked, is_masked_row, loss_mask
from dentropy.rollouts.text import TextReader

PROMPT = ("prompt_ids",), ("prompt", "input")  # columns of token ids, columns of text
RESPONSE = ("response_ids", "completion_ids"), ("response", "completion", "output")
LARGEST_ID = 2**63 - 1
LISTS = (list, np.ndarray)
Ids = Sequence[int] | np.ndarray
PARQUET = b"PAR1"  # what such a file begins with
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
        if raw.startswith(PARQUET):
            raise ValueError(
                f"{where}: Parquet, expected JSON lines (read_rollouts reads rollouts in Parquet; for prompts, "
                "pandas.read_parquet(...).to_json(..., orient='records', lines=True) makes them)"
            )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}), expected UTF-8 text") from error


class TokenRows(NamedTuple):
    """Token ids and masks of all lines of a file, and in words what of the rollouts the file has lost.

    written: how many response tokens each line holds, where the end was then cut off or put back.
    """

    ids: list[np.ndarray]
    masks: list[np.ndarray]
    written: list[int]
    lost: list[str]

    @property
    def prompts(self) -> list[int]:
        """A number for each line, equal where what comes before the first generated token is."""
        number: dict[bytes, int] = {}
        prompts = (ids[: np.argmax(mask) or len(ids)] for ids, mask in zip(self.ids, self.masks, strict=True))
        return [number.setdefault(ids.astype(np.int64).tobytes(), len(number)) for ids in prompts]


def token_rows(
    rows: list[tuple[str, dict]],
    tokenizer,
    append_eos: bool | str,
    end_tokens: int | Sequence[int] | None,
    max_new_tokens: int | None,
) -> TokenRows:
    """Those of lines of both kinds; `PackedBatch.from_jsonl` explains."""
    text = TextReader(tokenizer)
    plain = [(where, row) for where, row in rows if not is_masked_row(row)]
    prompts = [tokens_of(where, row, *PROMPT, text.prompt) for where, row in plain]
    read = [tokens_of(where, row, *RESPONSE, text.response) for where, row in plain]
    from_text = [not has(row, RESPONSE[0]) for _, row in plain]
    responses = [cut_masked(*row, *ids) for row, *ids in zip(plain, prompts, read, from_text, strict=True)]
    masked = sum(map(len, read)) - sum(map(len, responses))
    if text.texts:
        for (_, row), *pair in zip(plain, prompts, read, strict=True):
            for ids, (id_names, text_names) in zip(pair, (PROMPT, RESPONSE), strict=True):
                if has(row, id_names) and has(row, text_names):
                    text.compare(ids)
    known = () if end_tokens is None else ends.as_tuple(end_tokens)
    unknown: list[str] = []
    if any(from_text) and append_eos:
        end = ends.appended_token(tokenizer, known, append_eos)
        known = known or (end,)
        responses, unknown = ends.close(responses, plain, from_text, end, known, max_new_tokens)
    elif any(from_text) and not known and tokenizer.eos_token_id is not None:
        known = (tokenizer.eos_token_id,)
    of_plain = zip(plain, prompts, responses, map(len, read), strict=True)
    whole = Whole()
    found = [_masked_row(*line) if is_masked_row(line[1]) else whole.row(*next(of_plain)) for line in rows]
    ids, masks, written = (list(column) for column in zip(*found, strict=True))
    last_turns = [_last_turn(*pair) for pair in zip(ids, masks, strict=True)] if known else []
    lost = [*text.losses(), *ends.losses(last_turns, known, any(from_text)), *unknown]
    lost += [f"{masked} masked tokens behind responses were cut off"] if masked else []
    return TokenRows(ids, masks, written, lost)


class Whole:
    """Prompts and responses as one row each, with the mask that tells them apart: a part of one that serves all."""

    def __init__(self):
        self._ids, self._longest = Tape(np.int32), 0
        self._mask = np.zeros(0, bool)

    def row(
        self, line: tuple[str, dict], prompt: Ids, response: Ids, written: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        if not len(prompt):
            raise ValueError(f"{line[0]}: the prompt is empty, expected at least one token (a start token will do)")
        if max(len(prompt), len(response)) > self._longest:
            self._longest = 2 * max(len(prompt), len(response))
            self._mask = np.arange(2 * self._longest) >= self._longest
        mask = self._mask[self._longest - len(prompt) : self._longest + len(response)]
        parts = [np.asarray(part) if len(part) else np.empty(0, np.int32) for part in (prompt, response)]
        ids = np.concatenate(parts)
        return self._ids.add(ids) if ids.dtype == np.int32 else ids, mask, written


def _masked_row(where: str, row: dict) -> tuple[np.ndarray, np.ndarray, int]:
    ids = tokens_of(where, row, ("token_ids",), (), None)
    if not len(ids):
        raise ValueError(f"{where}: token_ids: empty, expected at least one token (a start token will do)")
    mask = np.array(loss_mask(where, row, ids), dtype=bool)
    return np.asarray(ids), mask, int(np.count_nonzero(mask))


def _last_turn(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The generated tokens behind which no given one stands before another: a response, where there is one turn."""
    stop = len(mask) - int(np.argmax(mask[::-1])) if mask.any() else 0
    start = stop - (int(np.argmin(mask[:stop][::-1])) if stop else 0)
    return ids[start:stop]


def advantages_of(path, rows: list[tuple[str, dict]], found: TokenRows) -> list | None:
    """The column `advantage`: a number for each line, or for each a list of one per generated token."""
    values = column_of(path, rows, ("advantage",), _check_number_or_numbers)
    if values is None:
        return None
    several = isinstance(values[0], LISTS)
    for (where, _), value in zip(rows, values, strict=True):
        if isinstance(value, LISTS) != several:
            said, expected = ("a number", "a list") if several else ("a list", "a number")
            raise ValueError(f"{where}: advantage: {said}, expected {expected} as in the first line")
    return _per_token("advantage", rows, values, found) if several else values


def sampler_logps_of(path, rows: list[tuple[str, dict]], found: TokenRows) -> list | None:
    """The column `sampler_logp`: for each line a list of one number per generated token."""
    values = column_of(path, rows, ("sampler_logp",), check_numbers)
    return None if values is None else _per_token("sampler_logp", rows, values, found)


def _per_token(name: str, rows: list[tuple[str, dict]], values: list, found: TokenRows) -> list[list]:
    """Each line's values, those of a cut end left out."""
    kept = []
    for (where, _), value, mask, written in zip(rows, values, found.masks, found.written, strict=True):
        n = int(np.count_nonzero(mask))
        if len(value) != n and not len(value) == written > n:
            raise ValueError(f"{where}: {name}: {len(value)} values for {n} generated tokens, expected one for each")
        kept.append(value[:n])
    return kept


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
            if isinstance(ids, np.ndarray):  # of `compact`, which looked at them
                return ids
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


def check_numbers(where: str, value) -> None:
    if isinstance(value, np.ndarray):  # of `compact`, which looked at them
        return
    if not isinstance(value, list):
        raise ValueError(f"{where}: {value!r:.40}, expected a list of numbers")
    for number in value:
        check_number(where, number)


def _check_number_or_numbers(where: str, value) -> None:
    (check_numbers if isinstance(value, LISTS) else check_number)(where, value)


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
