"""Rollouts, packed: what every pass reads.

A `PackedBatch` holds the tokens of all rollouts one after the other, without padding, with the lengths of prompts and
responses, the prompt group of each rollout, the temperature they were sampled at and, where known, their rewards.
"""

import json
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dentropy.doors import third_party
from dentropy.rollouts.readers import (
    LARGEST_ID,
    check_label,
    check_number,
    check_reward,
    column_of,
    is_number,
    json_lines,
    prompts_and_responses,
)

TEMPERATURES = (1e-6, 1e6)  # logits divided by less could leave float32


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
        advantage: float64 [S] or None: what an update multiplies each rollout's score with, as it is.

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
            temperature=checked_temperature(temperature),
            reward=None if reward is None else _one_number_each("reward", reward, n),
            advantage=None if advantage is None else _one_number_each("advantage", advantage, n),
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
        sequences, masks = _array(sequences, "sequences"), _array(attention_masks, "attention_masks")
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
    def from_jsonl(
        cls,
        path,
        tokenizer=None,
        append_eos: bool | str = False,
        *,
        end_tokens: int | Sequence[int] | None = None,
        max_new_tokens: int | None = None,
    ) -> "PackedBatch":
        """From a file with one JSON object per line (blank lines are skipped).

        Columns, the first that is there is taken:
        `prompt_ids`, or text or chat messages in `prompt` or `input`; `response_ids` or `completion_ids`, or text or
        one assistant message in `response`, `completion` or `output`; `reward` or `score`, and `advantage` (a number
        each; all lines or none); `group` (all lines or none: then rollouts of equal prompts are one group);
        `temperature` (equal in all lines, default 1). A column with `mask` in its name has to be 1 at all response
        tokens; what it masks at the end of a response, padding, is cut off. Others are ignored.

        Token ids are exact and text may not be: dumps leave out special tokens, those of chat prompts and the end
        token of responses, and encoding a text anew need not give the ids that were sampled. One warning names all
        that was seen of this. Chat messages go through the tokenizer's template; where the last one is the
        assistant's, the response goes on from it.

        Args:
            path: the file.
            tokenizer: for text.
            append_eos: put an end token behind every text response that was not cut off: True the one that can be
                determined from end_tokens and the chat template, text the one that it names.
            end_tokens: what ends a response of this policy, as `dentropy.rollouts.sampling.end_tokens(policy)` says;
                None or none means the tokenizer's end token where responses are text, and is not checked where not.
            max_new_tokens: where sampling cut responses off: one of so many tokens gets no end token (nor does one
                whose `finish_reason` is "length").

        Raises:
            ValueError: naming the file and the line.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = Path(folder, "rollouts.jsonl")
            ...     PackedBatch.from_lists([[5, 6]], [[7, 2]], reward=[1.0]).to_jsonl(path)
            ...     PackedBatch.from_jsonl(path, end_tokens=[2]).reward
            array([1.])
        """
        rows = list(json_lines(Path(path)))
        if not rows:
            raise ValueError(f"{path}: no rollouts, expected one JSON object per line")
        prompts, responses, lost = prompts_and_responses(rows, tokenizer, append_eos, end_tokens, max_new_tokens)
        temperature = rows[0][1].get("temperature", 1.0)
        for where, row in rows:
            check_number(f"{where}: temperature", row.get("temperature", 1.0))
            if row.get("temperature", 1.0) != temperature:
                raise ValueError(
                    f"{where}: temperature {row.get('temperature', 1.0)}, expected that of the first "
                    f"line, {temperature}: entropy and weights are those of one distribution"
                )
        group = column_of(path, rows, ("group",), check_label)
        reward = column_of(path, rows, ("reward", "score"), check_reward)
        reward = None if reward is None else [float(value) for value in reward]
        try:
            batch = cls.from_lists(
                prompts,
                responses,
                reward=reward,
                advantage=column_of(path, rows, ("advantage",), check_number),
                group=[tuple(p) for p in prompts] if group is None else group,
                temperature=temperature,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if lost:
            warnings.warn(f"{path}: {'; '.join(lost)}", stacklevel=2)
        return batch

    def to_jsonl(self, path, tokenizer=None) -> None:
        """Writes what `from_jsonl` reads: token ids, group, temperature, reward and advantage; text too, given a
        tokenizer."""
        with open(path, "w", encoding="utf-8") as file:
            for i in range(len(self)):
                row = {
                    "prompt_ids": self.prompt(i),
                    "response_ids": self.response(i),
                    "group": int(self.group[i]),
                    "temperature": self.temperature,
                }
                if self.reward is not None:
                    row["reward"] = float(self.reward[i])
                if self.advantage is not None:
                    row["advantage"] = float(self.advantage[i])
                if tokenizer is not None:
                    row["prompt"] = tokenizer.decode(row["prompt_ids"])
                    row["response"] = tokenizer.decode(row["response_ids"])
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def take(self, rows) -> "PackedBatch":
        """The rollouts `rows`, at least one of their indices, in that order, as a batch of their own.

        Groups keep their numbers.

        Raises:
            ValueError: for no rows and for indices outside [0, S).

        Example:
            >>> batch = PackedBatch.from_lists([[5], [6], [7]], [[1, 2], [3], [4]], group=[0, 0, 1])
            >>> [batch.take([2, 0]).response(i) for i in range(2)]
            [[4], [1, 2]]
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size == 0 or rows.min() < 0 or rows.max() >= len(self):
            raise ValueError(f"rows: {rows.tolist()}, expected indices of rollouts, from 0 to {len(self) - 1}")
        offsets = self.offsets
        return PackedBatch(
            tokens=torch.cat([self.tokens[offsets[i] : offsets[i + 1]] for i in rows]),
            prompt_lens=self.prompt_lens[rows],
            response_lens=self.response_lens[rows],
            group=self.group[rows],
            temperature=self.temperature,
            reward=None if self.reward is None else self.reward[rows],
            advantage=None if self.advantage is None else self.advantage[rows],
        )

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


def _array(values, argument: str) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    with third_party(f"{argument}: no array", "a list of numbers or lists of one length"):
        return np.asarray(values)


def token_ids(ids, name: str, i: int) -> np.ndarray:
    """int64 [n]; ValueError naming `name[i]` for what is no flat sequence of token ids."""
    ids = _array(ids, f"{name}[{i}]")
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"{name}[{i}]: {ids.dtype} of shape {ids.shape}, expected a flat sequence of token ids")
    if ids.size and (ids.min() < 0 or ids.max() > LARGEST_ID):
        outside = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{name}[{i}]: token id {outside} is outside the vocabulary, expected ids from 0")
    return ids.astype(np.int64)


def _groups(group: Sequence, n: int) -> np.ndarray:
    labels = list(np.asarray(group).tolist() if isinstance(group, (np.ndarray, Tensor)) else group)
    if len(labels) != n:
        raise ValueError(f"group: {len(labels)} labels, expected one per rollout, {n}")
    if all(isinstance(label, (int, np.integer)) and -LARGEST_ID <= label <= LARGEST_ID for label in labels):
        return np.array(labels, dtype=np.int64)
    if not all(isinstance(label, Hashable) and label == label for label in labels):
        raise ValueError("group: labels of the kind of a list or NaN, expected integers or text")
    number: dict = {}
    return np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.int64)


def _one_number_each(name: str, values, n: int) -> np.ndarray:
    values = _array(values, name)
    if values.dtype.kind not in "biuf":  # text would be read as the numbers it spells
        raise ValueError(f"{name}: {values.dtype} values, expected one number per rollout")
    values = values.astype(np.float64)
    if values.shape != (n,):
        raise ValueError(f"{name}: shape {values.shape}, expected one number per rollout, [{n}]")
    if not np.isfinite(values).all():
        i = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}[{i}]: {values[i]}, expected a finite number")
    return values


def checked_temperature(temperature) -> float:
    low, high = TEMPERATURES
    if not is_number(temperature) or not low <= temperature <= high:
        raise ValueError(f"temperature: {temperature!r:.40}, expected a positive number, from {low:g} to {high:g}")
    return float(temperature)
