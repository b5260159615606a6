"""Rollouts as trainers record them: a file or a folder, in whichever format it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.files import Rows, rows_in
from dentropy.rollouts.folders import LISTED, files_of, number, one_of
from dentropy.rollouts.formats import plain
from dentropy.rollouts.formats.format import Asked, Format
from dentropy.rollouts.formats.known import recognized

_log = logging.getLogger(__name__)
# What leaves a sampler's distribution as it is; anything else is another one, which the policy's entropy is not of.
UNCUT = {"top_p": (None, 1), "top_k": (None, 0, -1), "min_p": (None, 0), "repetition_penalty": (None, 1)}
SETTINGS = ("sampling_params", "generation_config", "generation_kwargs", "metadata")  # columns that may hold them


def read_rollouts(
    path,
    tokenizer=None,
    append_eos: bool | str = False,
    *,
    end_tokens: int | Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    reward: str | None = None,
    step: int | None = None,
    say: Callable[[str], None] = _log.info,
) -> PackedBatch:
    """Rollouts of one policy, from a file or folder of TRL, verl, prime-rl, NeMo-RL, open-instruct, AReaL, slime,
    conversations, or dentropy's own (`PackedBatch.from_jsonl` says which columns those are).

    The format is told by the columns of the first row, and the file's kind (JSON lines, a JSON array, Parquet,
    torch.save) by its first bytes. Nothing that a file does not say is guessed: it is asked for, or warned of.

    Args:
        path: a file, or a folder of files of one step, or a run's folder with one step in it or `step` given.
        tokenizer, append_eos, end_tokens, max_new_tokens: for text, as in `PackedBatch.from_jsonl`.
        temperature: of sampling; trainers do not record it. Where rows have one, it has to be that.
        reward: the column that is the reward, where several may be.
        step: the one to read, where there are several.
        say: called once with what was recognized, in words, where that is not dentropy's own format.

    Returns:
        The batch. Its groups are those the format tells (verl's uid, open-instruct's prompt_idx, AReaL's task_id,
        slime's group_index), else equal prompts.

    Raises:
        ValueError: naming the file, the row and the column; for what has to be asked, the argument; for rollouts of
            several steps, and for those that top-p, top-k or min-p cut.

    Example:
        >>> import json, tempfile
        >>> row = {"prompt_tokens": [5, 6], "response_tokens": [7, 2], "prompt_idx": 0, "step": 3, "reward": 1.0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "rollouts.jsonl")
        ...     _ = path.write_text(json.dumps(row))
        ...     batch = read_rollouts(path, temperature=1.0, say=lambda said: print(said.rpartition(": ")[2]))
        rollouts of open-instruct (1 rows, step 3)
        >>> batch.response(0), batch.reward
        ([7, 2], array([1.]))
    """
    asked = Asked(tokenizer, append_eos, end_tokens, max_new_tokens, temperature, reward)
    path = Path(path)
    form, rows = _rows(path, step)
    for where, row in rows:
        _check_uncut(where, row)
    lines = _of_one_step(path, form.plain_rows(rows, asked), step)
    batch = PackedBatch.of_lines(
        path, [_heated(*line, form, temperature) for line in lines], tokenizer, append_eos, end_tokens, max_new_tokens
    )
    steps = {row["step"] for _, row in lines if row.get("step") is not None}
    if form is not plain.FORMAT:
        say(f"{path}: {form.name} ({len(batch)} rows{''.join(f', step {found}' for found in steps)})")
    return batch


def _rows(path: Path, step: int | None) -> tuple[Format, Rows]:
    """All rows, and their format; of a folder, one step's."""
    files = files_of(path, step)
    rows = rows_in(files[0])
    form = recognized(*rows[0])
    if not form.shards:
        file = one_of(path, files, step)
        if file != files[0]:
            rows = rows_in(file)
            form = recognized(*rows[0])
        return form, rows
    for file in files[1:]:
        more = rows_in(file)
        if recognized(*more[0]) is not form:
            raise ValueError(f"{file}: {recognized(*more[0]).name}, expected {form.name} as in {files[0].name}")
        rows += more
    return form, rows


def _of_one_step(path: Path, lines: Rows, step: int | None) -> Rows:
    steps = list(dict.fromkeys(_step(*line) for line in lines))
    if step is not None and steps == [None]:
        if step not in map(number, (path, Path(lines[0][0].rpartition(": ")[0]))):
            raise ValueError(f"step: {step}, but {path} does not say of which step it is, expected none")
    elif step is not None:
        lines = [(where, row) for where, row in lines if row.get("step") == step]
        if not lines:
            raise ValueError(f"step: {step} is not in {path}, expected one of {_list(steps)}")
    elif len(steps) > 1:
        raise ValueError(
            f"{path}: rows of {len(steps)} steps, each sampled by a policy of its own, choose one (step=, --step): "
            f"{_list(steps)}"
        )
    return lines


def _step(where: str, row: dict) -> int | None:
    step = row.get("step")
    if step is not None and type(step) is not int:
        raise ValueError(f"{where}: step: {step!r:.40}, expected a whole number")
    return step


def _list(steps: list) -> str:
    return ", ".join(map(str, steps[:LISTED])) + ", ..." * (len(steps) > LISTED)


def _heated(where: str, row: dict, form: Format, temperature: float | None) -> tuple[str, dict]:
    """The row with its temperature: its own, the one asked for, or the format's."""
    if "temperature" not in row:
        said = form.temperature if temperature is None else temperature
        if said is None:
            raise ValueError(
                f"{where}: no temperature, which {form.name} does not hold, expected that of sampling "
                "(temperature=, --temperature)"
            )
        return where, row | {"temperature": said}
    if temperature is not None and row["temperature"] != temperature:
        raise ValueError(f"{where}: temperature: {row['temperature']!r:.40}, expected that asked for, {temperature}")
    return where, row


def _check_uncut(where: str, row: dict) -> None:
    for settings in (row, *(row[name] for name in SETTINGS if isinstance(row.get(name), dict))):
        for name, uncut in UNCUT.items():
            if settings.get(name) not in uncut:
                raise ValueError(
                    f"{where}: {name}: {settings[name]!r:.40}: sampled with it, these rollouts are of another "
                    f"distribution than the policy's, expected {name} at {uncut[-1]}"
                )
