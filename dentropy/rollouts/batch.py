"""Rollouts, packed: what every pass reads.

A `PackedBatch` holds the tokens of all rollouts one after the other, without padding, with the lengths of prompts and
responses, the prompt group of each rollout, the temperature they were sampled at and, where known, their rewards.
"""

import json
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dentropy.rollouts.readers import column_of, json_lines, tokens_of

RESPONSE_IDS = ("response_ids", "completion_ids")
RESPONSE_TEXT = ("response", "completion", "output")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rollouts of one policy at one sampling temperature. Not to be changed once made.

    Build one with `from_lists`, `from_padded` or `from_jsonl`; they check what they are given (ValueError).

    Attributes:
        tokens: int64 [total], CPU: prompt then response of every rollout, the sampled end token included.
        prompt_lens, response_lens: int64 [S].
        group: int64 [S], equal for rollouts of one prompt.
        temperature: the sampling temperature (> 0).
        reward: float64 [S] or None.
        advantage: float64 [S] or None: what a policy gradient weighs each rollout by, used as it is.

    Example:
        >>> batch = PackedBatch.from_lists([[5, 6], [5, 6]], [[7, 2], [8]], group=[0, 0])
        >>> len(batch), batch.n_tokens, batch.response(0)
        (2, 3, [7, 2])
    """

    tokens: Tensor
    prompt_lens: np.ndarray
    response_lens: np.ndarray
    group: np.ndarray
    temperature: float = 1.0
    reward: np.ndarray | None = None
    advantage: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def n_tokens(self) -> int:
        """Response tokens, summed over rollouts."""
        return int(self.response_lens.sum())

    @property
    def n_groups(self) -> int:
        return len(np.unique(self.group))

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [S + 1]: rollout i is tokens[offsets[i]:offsets[i + 1]]."""
        return np.concatenate([[0], np.cumsum(self.prompt_lens + self.response_lens)])

    @cached_property
    def response_offsets(self) -> np.ndarray:
        """int64 [S + 1]: the response of rollout i is [response_offsets[i], response_offsets[i + 1]) of all responses'
        tokens, end to end."""
        return np.concatenate([[0], np.cumsum(self.response_lens)])

    def prompt(self, i: int) -> list[int]:
        start = self.offsets[i]
        return self.tokens[start : start + self.prompt_lens[i]].tolist()

    def response(self, i: int) -> list[int]:
        stop = self.offsets[i + 1]
        return self.tokens[stop - self.response_lens[i] : stop].tolist()

    def take(self, rollouts: Sequence[int]) -> "PackedBatch":
        """The batch of these rollouts alone, in this order."""
        spans = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in rollouts]
        columns = ("prompt_lens", "response_lens", "group", "reward", "advantage")
        kept = {name: getattr(self, name) for name in columns}
        kept = {name: None if values is None else values[list(rollouts)] for name, values in kept.items()}
        return PackedBatch(torch.cat(spans), temperature=self.temperature, **kept)

    @classmethod
    def from_lists(cls, prompts, responses, group=None, reward=None, temperature=1.0, advantage=None) -> "PackedBatch":
        """From lists of token ids, one prompt and one response per rollout.

        Args:
            prompts, responses: S sequences of ints each. A prompt needs at least one token (its last position
                predicts the first response token); a response may be empty, but not all of them.
            group: S labels (ints are kept, others are numbered in order of appearance); None makes each rollout its
                own.
            reward: S finite numbers or None.
            temperature: the one they were sampled at.
            advantage: S finite numbers or None.

        Raises:
            ValueError: naming the argument and the rollout.
        """
        prompts = [token_ids(ids, "prompts", i) for i, ids in enumerate(prompts)]
        responses = [token_ids(ids, "responses", i) for i, ids in enumerate(responses)]
        n = len(prompts)
        if n == 0:
            raise ValueError("prompts: empty, expected at least one rollout")
        if len(responses) != n:
            raise ValueError(f"responses: {len(responses)} of them for {n} prompts, expected one per prompt")
        for i, ids in enumerate(prompts):
            if not len(ids):
                raise ValueError(
                    f"prompts[{i}]: empty, expected at least one token (a start token will do): "
                    "the first response token is predicted from the prompt's last position"
                )
        if not any(len(ids) for ids in responses):
            raise ValueError("responses: all are empty, expected at least one response token")
        return cls(
            tokens=torch.from_numpy(np.concatenate([x for pair in zip(prompts, responses, strict=True) for x in pair])),
            prompt_lens=np.array([len(ids) for ids in prompts], dtype=np.int64),
            response_lens=np.array([len(ids) for ids in responses], dtype=np.int64),
            group=np.arange(n) if group is None else _groups(group, n),
            temperature=_temperature(temperature),
            reward=None if reward is None else _per_rollout("reward", reward, n),
            advantage=None if advantage is None else _per_rollout("advantage", advantage, n),
        )

    @classmethod
    def from_padded(
        cls, sequences, attention_masks, prompt_lens, gen_lens, *, reward=None, temperature=1.0
    ) -> "PackedBatch":
        """From the padded layout of B prompts with G responses each; rollout b·G + g, group b.

        Args:
            sequences: int [B, G, L]: prompts left-padded to one length per row, the response right after it.
            attention_masks: int [B, G, L], 1 at real tokens.
            prompt_lens: [B], the padded lengths of the prompts.
            gen_lens: [B][G], tokens of the responses.
            reward: [B, G] or None.
            temperature: the one they were sampled at.

        Raises:
            ValueError: naming the argument, the row and what was expected.

        Example:
            >>> tokens, masks = [[[0, 5, 7, 2], [0, 5, 8, 0]]], [[[0, 1, 1, 1], [0, 1, 1, 0]]]
            >>> batch = PackedBatch.from_padded(tokens, masks, prompt_lens=[2], gen_lens=[[2, 1]])
            >>> batch.prompt(0), batch.response(0), batch.response(1)
            ([5], [7, 2], [8])
        """
        sequences, masks = _array(sequences), _array(attention_masks)
        if sequences.ndim != 3:
            raise ValueError(f"sequences: shape {sequences.shape}, expected [B, G, L]")
        if masks.shape != sequences.shape:
            raise ValueError(f"attention_masks: shape {masks.shape}, expected that of sequences, {sequences.shape}")
        rows, per_prompt, width = sequences.shape
        if len(prompt_lens) != rows:
            raise ValueError(f"prompt_lens: {len(prompt_lens)} of them, expected B = {rows}")
        if len(gen_lens) != rows or any(np.shape(lens) != (per_prompt,) for lens in gen_lens):
            raise ValueError(f"gen_lens: {len(gen_lens)} lists, expected B = {rows} lists of G = {per_prompt} lengths")
        prompts, responses = [], []
        for b, g in np.ndindex(rows, per_prompt):
            start, stop = int(prompt_lens[b]), int(prompt_lens[b]) + int(gen_lens[b][g])
            if not 0 <= start <= stop <= width:
                raise ValueError(
                    f"gen_lens[{b}][{g}]: prompt {start} + response {stop - start} tokens, expected at most L = {width}"
                )
            if not masks[b, g, start:stop].all() or masks[b, g, stop:].any():
                raise ValueError(
                    f"attention_masks[{b}][{g}]: 0 in the response or 1 after it, expected 1 at {start}:{stop}, then 0"
                )
            if (np.diff(masks[b, g, :start].astype(int)) < 0).any():
                raise ValueError(f"attention_masks[{b}][{g}]: 0 after a 1 in the prompt, expected padding on the left")
            prompts.append(sequences[b, g, :start][masks[b, g, :start].astype(bool)])
            responses.append(sequences[b, g, start:stop])
        group = np.repeat(np.arange(rows), per_prompt)
        reward = None if reward is None else np.asarray(reward, dtype=np.float64).reshape(-1)
        return cls.from_lists(prompts, responses, group=group, reward=reward, temperature=temperature)

    @classmethod
    def from_jsonl(cls, path, tokenizer=None, append_eos: bool = False) -> "PackedBatch":
        """From a file with one JSON object per line (blank lines are skipped).

        Columns, the first that is there is taken:
        `prompt_ids`, or text in `prompt` or `input`; `response_ids` or `completion_ids`, or text in `response`,
        `completion` or `output`; `reward` or `score` (a number; all lines or none), `advantage` likewise; `group` (all
        lines or none: then rollouts of equal prompts are one group); `temperature` (equal in all lines, default 1). So
        TRL completions logs and verl rollout dumps, saved as JSON lines, are read as they are.

        Token ids are exact and text may not be: dumps leave out special tokens, so the end token is missing from their
        responses (a warning says so).

        Args:
            path: the file.
            tokenizer: for text.
            append_eos: put the end token behind every text response.

        Raises:
            ValueError: naming the file and the line.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = Path(folder, "rollouts.jsonl")
            ...     PackedBatch.from_lists([[5, 6]], [[7, 2]], reward=[1.0]).to_jsonl(path)
            ...     PackedBatch.from_jsonl(path).reward
            array([1.])
        """
        rows = list(json_lines(Path(path)))
        if not rows:
            raise ValueError(f"{path}: no rollouts, expected one JSON object per line")
        prompts, responses = [], []
        for where, row in rows:
            prompts.append(tokens_of(where, row, ("prompt_ids",), ("prompt", "input"), tokenizer, is_prompt=True))
            responses.append(
                tokens_of(where, row, RESPONSE_IDS, RESPONSE_TEXT, tokenizer, is_prompt=False, append_eos=append_eos)
            )
        if not any(name in rows[0][1] for name in RESPONSE_IDS):
            _warn_without_end_tokens(path, responses, tokenizer.eos_token_id)
        temperature = rows[0][1].get("temperature", 1.0)
        for where, row in rows:
            if row.get("temperature", 1.0) != temperature:
                raise ValueError(
                    f"{where}: temperature {row.get('temperature', 1.0)}, expected that of the first "
                    f"line, {temperature}: entropy and weights are those of one distribution"
                )
        group = column_of(path, rows, ("group",))
        try:
            return cls.from_lists(
                prompts,
                responses,
                reward=column_of(path, rows, ("reward", "score")),
                advantage=column_of(path, rows, ("advantage",)),
                group=[tuple(p) for p in prompts] if group is None else group,
                temperature=temperature,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_jsonl(self, path, tokenizer=None) -> None:
        """Writes what `from_jsonl` reads: token ids and the other columns; text too, given a tokenizer."""
        with open(path, "w", encoding="utf-8") as file:
            for i in range(len(self)):
                row = {
                    "prompt_ids": self.prompt(i),
                    "response_ids": self.response(i),
                    "group": int(self.group[i]),
                    "temperature": self.temperature,
                }
                for name in ("reward", "advantage"):
                    if (values := getattr(self, name)) is not None:
                        row[name] = float(values[i])
                if tokenizer is not None:
                    row["prompt"] = tokenizer.decode(row["prompt_ids"])
                    row["response"] = tokenizer.decode(row["response_ids"])
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError naming the first rollout with a token id the policy does not have."""
        bad = torch.nonzero(self.tokens >= vocab_size)
        if len(bad):
            at = int(bad[0])
            rollout = int(np.searchsorted(self.offsets, at, side="right")) - 1
            raise ValueError(
                f"rollout {rollout}: token id {int(self.tokens[at])} is outside the vocabulary, "
                f"expected ids below {vocab_size}"
            )


def _warn_without_end_tokens(path, responses: list[list[int]], eos: int | None) -> None:
    if eos is not None and not any(len(ids) and ids[-1] == eos for ids in responses):
        warnings.warn(
            f"{path}: no response ends with the end token, which text dumps leave out; entropy and slope then miss "
            "every decision to stop: use append_eos (--append-eos)",
            stacklevel=3,
        )


def _array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def token_ids(ids, name: str, i: int) -> np.ndarray:
    """int64 [n]; ValueError naming `name[i]` for what is no flat sequence of token ids."""
    ids = _array(ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"{name}[{i}]: {ids.dtype} of shape {ids.shape}, expected a flat sequence of token ids")
    if ids.size and ids.min() < 0:
        raise ValueError(f"{name}[{i}]: token id {ids.min()} is outside the vocabulary, expected ids from 0")
    return ids.astype(np.int64)


def _groups(group: Sequence, n: int) -> np.ndarray:
    labels = list(np.asarray(group).tolist() if isinstance(group, (np.ndarray, Tensor)) else group)
    if len(labels) != n:
        raise ValueError(f"group: {len(labels)} labels, expected one per rollout, {n}")
    if all(isinstance(label, (int, np.integer)) for label in labels):
        return np.array(labels, dtype=np.int64)
    if not all(isinstance(label, Hashable) for label in labels):
        raise ValueError("group: labels of the kind of a list, expected integers or text")
    number: dict = {}
    return np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.int64)


def _per_rollout(argument: str, values, n: int) -> np.ndarray:
    try:
        values = np.asarray(_array(values), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: {error}, expected one number per rollout") from error
    if values.shape != (n,):
        raise ValueError(f"{argument}: shape {values.shape}, expected one number per rollout, [{n}]")
    if not np.isfinite(values).all():
        i = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{argument}[{i}]: {values[i]}, expected a finite number")
    return values


def _temperature(temperature) -> float:
    if not isinstance(temperature, Real) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: {temperature!r}, expected a positive number")
    return float(temperature)
