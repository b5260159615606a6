"""Rollouts, packed: what every pass reads.

A `PackedBatch` holds the tokens of all rollouts one after the other, without padding, and which of them the policy
generated, with the prompt group of each rollout, the temperature it was sampled at and, where known, its reward. A
prompt and its response are the simplest case; with several turns, or tools, given tokens stand between generated ones.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dentropy.rollouts import columns
from dentropy.rollouts.compact import Compact
from dentropy.rollouts.readers import (
    advantages_of,
    check_label,
    check_number,
    check_reward,
    column_of,
    json_lines,
    sampler_logps_of,
    token_rows,
)
from dentropy.shown import count, line


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rollouts of one policy. Not to be changed once made.

    Build one with `from_lists`, `from_rows`, `from_padded` or `from_jsonl`; they check what they are given
    (ValueError). A rollout is a row of tokens, some of which the policy generated; the others are context. The first
    token of a row is given, and the last one generated, unless none of the row is.

    Attributes:
        tokens: int64 [total], CPU: the rows end to end, sampled end tokens included.
        generated: bool [total]: the policy generated it.
        row_lens: int64 [S].
        group: int64 [S], equal for rollouts of one prompt.
        temperature: the sampling temperature (> 0) of all rollouts; float64 [S] where they differ.
        reward: float64 [S] or None.
        advantage: float64 [S], what an update multiplies each rollout's score with, as it is, or [n_tokens], each
            generated token's; or None.
        sampler_logp: float64 [n_tokens] or None: the log-probability of each generated token, in nats, that the
            sampler reported. With it the rollouts are taken for the sampler's and reweighted, see `base_weights`;
            without it for the policy's own.

    Example:
        >>> batch = PackedBatch.from_lists([[5, 6], [5, 6]], [[7, 2], [8]], group=[0, 0])
        >>> len(batch), batch.n_tokens, batch.response(0)
        (2, 3, [7, 2])
    """

    tokens: Tensor
    generated: np.ndarray
    row_lens: np.ndarray
    group: np.ndarray
    temperature: float | np.ndarray = 1.0
    reward: np.ndarray | None = None
    advantage: np.ndarray | None = None
    sampler_logp: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row_lens)

    def __repr__(self) -> str:
        low, high = (f"{bound(self.temperature):g}" for bound in (np.min, np.max))
        return line(
            self,
            f"{count(len(self), 'rollout')} of {count(self.n_groups, 'prompt')}",
            f"{self.n_tokens:,} generated of {count(len(self.tokens), 'token')}",
            f"temperature {low}" + ("" if low == high else f" to {high}"),
            None if self.reward is None else f"mean reward {np.mean(self.reward):.4g}",
            None if self.advantage is None else "advantages",
            None if self.sampler_logp is None else "the sampler's log-probabilities",
        )

    @property
    def n_tokens(self) -> int:
        """Generated tokens, summed over rollouts."""
        return int(self.response_offsets[-1])

    @property
    def n_groups(self) -> int:
        return len(np.unique(self.group))

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [S + 1]: rollout i is tokens[offsets[i]:offsets[i + 1]]."""
        return np.concatenate([[0], np.cumsum(self.row_lens)])

    @cached_property
    def response_offsets(self) -> np.ndarray:
        """int64 [S + 1]: the generated tokens of rollout i are [response_offsets[i], response_offsets[i + 1]) of all
        generated tokens, end to end."""
        return np.concatenate([[0], np.cumsum(self.response_lens)])

    @cached_property
    def response_lens(self) -> np.ndarray:
        """int64 [S]: T_i, the generated tokens of each rollout."""
        # Row by row: a running sum over all tokens would take eight bytes for each.
        return np.fromiter((np.count_nonzero(row) for row in self._rows_generated()), np.int64, len(self))

    @cached_property
    def prompt_lens(self) -> np.ndarray:
        """int64 [S]: the tokens before the first generated one."""
        first = (row.argmax() if row.any() else len(row) for row in self._rows_generated())
        return np.fromiter(first, np.int64, len(self))

    def _rows_generated(self) -> Iterator[np.ndarray]:
        return (self.generated[a:b] for a, b in pairwise(self.offsets.tolist()))

    @property
    def temperatures(self) -> np.ndarray:
        """float64 [S]: that of each rollout."""
        return np.broadcast_to(np.asarray(self.temperature, dtype=np.float64), len(self))

    def row(self, i: int) -> tuple[list[int], list[bool]]:
        """The tokens of rollout i, and which of them were generated."""
        of_row = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[of_row].tolist(), self.generated[of_row].tolist()

    def prompt(self, i: int) -> list[int]:
        """The tokens before the first generated one."""
        start = self.offsets[i]
        return self.tokens[start : start + self.prompt_lens[i]].tolist()

    def response(self, i: int) -> list[int]:
        """The generated tokens, without what was given between them."""
        of_row = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[of_row][torch.from_numpy(self.generated[of_row])].tolist()

    @classmethod
    def from_lists(
        cls, prompts, responses, group=None, reward=None, temperature=1.0, advantage=None, sampler_logp=None
    ) -> "PackedBatch":
        """From lists of token ids, one prompt and one response per rollout.

        Args:
            prompts, responses: S sequences of ints each. A prompt needs at least one token (its last position
                predicts the first response token); a response may be empty, but not all of them.
            group, reward, advantage, temperature, sampler_logp: as in `from_rows`.

        Raises:
            ValueError: naming the argument and the rollout.
        """
        prompts = [columns.token_ids(ids, "prompts", i) for i, ids in enumerate(prompts)]
        responses = [columns.token_ids(ids, "responses", i) for i, ids in enumerate(responses)]
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
        return cls._of(
            [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)],
            [np.arange(len(p) + len(r)) >= len(p) for p, r in zip(prompts, responses, strict=True)],
            group=group,
            reward=reward,
            advantage=advantage,
            temperature=temperature,
            sampler_logp=sampler_logp,
        )

    @classmethod
    def from_rows(
        cls, token_ids, loss_mask, *, group=None, reward=None, advantage=None, temperature=1.0, sampler_logp=None
    ) -> "PackedBatch":
        """From rows of token ids with a mask of the tokens that the policy generated: several turns, tools.

        Given tokens between generated ones are context. Those after the last generated one of a row change nothing and
        are left out.

        Args:
            token_ids: S sequences of ints, each of at least one token.
            loss_mask: S sequences of as many 0s and 1s, 1 at generated tokens: not at the first of a row, which no
                position predicts. A row may have none, but not all rows.
            group: S labels (ints are kept, others are numbered in order of appearance); None makes each rollout its
                own.
            reward: S finite numbers or None.
            advantage: S finite numbers, or one for each generated token (packed, or a sequence for each rollout); or
                None.
            temperature: the one they were sampled at, or S of them.
            sampler_logp: the sampler's log-probability of each generated token, in nats (packed, or a sequence for
                each rollout); or None.

        Raises:
            ValueError: naming the argument and the rollout.

        Example:
            >>> batch = PackedBatch.from_rows([[5, 6, 7, 8, 9, 2]], [[0, 0, 1, 0, 1, 1]])
            >>> batch.prompt(0), batch.response(0), batch.n_tokens
            ([5, 6], [7, 9, 2], 3)
        """
        rows = [columns.token_ids(ids, "token_ids", i) for i, ids in enumerate(token_ids)]
        if not rows:
            raise ValueError("token_ids: empty, expected at least one rollout")
        if len(loss_mask) != len(rows):
            raise ValueError(f"loss_mask: {len(loss_mask)} masks for {len(rows)} rows, expected one per row")
        for i, ids in enumerate(rows):
            if not len(ids):
                raise ValueError(f"token_ids[{i}]: empty, expected at least one token (a start token will do)")
        masks = [columns.loss_mask(mask, i, len(rows[i])) for i, mask in enumerate(loss_mask)]
        if not any(mask.any() for mask in masks):
            raise ValueError("loss_mask: 0 at every token (the responses all are empty), expected 1 at one at least")
        ends = [int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else len(mask) for mask in masks]
        return cls._of(
            [ids[:end] for ids, end in zip(rows, ends, strict=True)],
            [mask[:end] for mask, end in zip(masks, ends, strict=True)],
            group=group,
            reward=reward,
            advantage=advantage,
            temperature=temperature,
            sampler_logp=sampler_logp,
        )

    @classmethod
    def _of(cls, rows, masks, *, group, reward, advantage, temperature, sampler_logp) -> "PackedBatch":
        """From checked rows and masks; the other columns are checked here."""
        n, lengths = len(rows), np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64)
        row_lens = np.array([len(ids) for ids in rows], dtype=np.int64)
        total = int(row_lens.sum())
        return cls(
            tokens=torch.from_numpy(columns.end_to_end(rows, total, np.int64)),
            generated=columns.end_to_end(masks, total, bool),
            row_lens=row_lens,
            group=np.arange(n) if group is None else columns.groups(group, n),
            temperature=columns.temperatures(temperature, n),
            reward=None if reward is None else columns.numbers("reward", reward, n, "rollout"),
            advantage=None if advantage is None else columns.advantages(advantage, lengths),
            sampler_logp=None if sampler_logp is None else columns.sampler_logps(sampler_logp, lengths),
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
        sequences, masks = columns.array(sequences, "sequences"), columns.array(attention_masks, "attention_masks")
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
        each, or for each generated token one; all lines or none); `group` (all lines or none: then rollouts of equal
        prompts are one group); `temperature` (default 1); `sampler_logp` (a number for each generated token; all lines
        or none). A column with `mask` in its name has to be 1 at all response tokens; what it masks at the end of a
        response, padding, is cut off. Others are ignored.

        Rollouts of several turns come as `token_ids` and `loss_mask`, 1 at generated tokens, in place of prompt and
        response (see `from_rows`); one file may hold both kinds of lines.

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
        compact = Compact()
        rows = [(where, compact.row(row)) for where, row in json_lines(Path(path))]
        if not rows:
            raise ValueError(f"{path}: no rollouts, expected one JSON object per line")
        return cls.of_lines(path, rows, tokenizer, append_eos, end_tokens, max_new_tokens)

    @classmethod
    def of_lines(cls, path, rows, tokenizer, append_eos, end_tokens, max_new_tokens) -> "PackedBatch":
        """From the rows of a file, each with its place in it, by the columns of `from_jsonl`."""
        found = token_rows(rows, tokenizer, append_eos, end_tokens, max_new_tokens)
        for where, row in rows:
            temperature = row.get("temperature", 1.0)
            check_number(f"{where}: temperature", temperature)
            columns.checked_temperature(temperature, f"{where}: temperature")
        group = column_of(path, rows, ("group",), check_label)
        reward = column_of(path, rows, ("reward", "score"), check_reward)
        advantage, sampler_logp = advantages_of(path, rows, found), sampler_logps_of(path, rows, found)
        try:
            batch = cls.from_rows(
                found.ids,
                found.masks,
                group=found.prompts if group is None else group,
                reward=None if reward is None else [float(value) for value in reward],
                advantage=advantage,
                temperature=[row.get("temperature", 1.0) for _, row in rows],
                sampler_logp=sampler_logp,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if found.lost:
            warnings.warn(f"{path}: {'; '.join(found.lost)}", stacklevel=3)
        return batch

    def to_jsonl(self, path, tokenizer=None) -> None:
        """Writes what `from_jsonl` reads, all columns; text too, given a tokenizer. A rollout with given tokens after
        its first generated one is written as `token_ids` and `loss_mask`, any other as prompt and response."""
        temperatures = self.temperatures.tolist()
        with open(path, "w", encoding="utf-8") as file:
            for i in range(len(self)):
                row = self._line(i, tokenizer) | {"group": int(self.group[i]), "temperature": temperatures[i]}
                tokens = slice(self.response_offsets[i], self.response_offsets[i + 1])
                if self.reward is not None:
                    row["reward"] = float(self.reward[i])
                if self.advantage is not None:
                    per_rollout = len(self.advantage) == len(self)
                    row["advantage"] = self.advantage[i if per_rollout else tokens].tolist()
                if self.sampler_logp is not None:
                    row["sampler_logp"] = self.sampler_logp[tokens].tolist()
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _line(self, i: int, tokenizer) -> dict:
        """The tokens of rollout i by the columns they are written in."""
        if self.prompt_lens[i] + self.response_lens[i] == self.row_lens[i]:
            row = {"prompt_ids": self.prompt(i), "response_ids": self.response(i)}
            if tokenizer is not None:
                row |= {name: tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "response")}
            return row
        tokens, generated = self.row(i)
        row = {"token_ids": tokens, "loss_mask": [int(flag) for flag in generated]}
        return row if tokenizer is None else row | {"text": tokenizer.decode(tokens)}

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
        tokens = _ranges_of(self.offsets, rows)
        generated = _ranges_of(self.response_offsets, rows)
        advantage = None
        if self.advantage is not None and len(self.advantage) == len(self):
            advantage = self.advantage[rows]
        elif self.advantage is not None:
            parts = np.split(self.advantage[generated], np.cumsum(self.response_lens[rows])[:-1])
            advantage = columns.advantages(parts, self.response_lens[rows])
        return PackedBatch(
            tokens=self.tokens[torch.from_numpy(tokens)],
            generated=self.generated[tokens],
            row_lens=self.row_lens[rows],
            group=self.group[rows],
            temperature=columns.common(self.temperatures[rows]),
            reward=None if self.reward is None else self.reward[rows],
            advantage=advantage,
            sampler_logp=None if self.sampler_logp is None else self.sampler_logp[generated],
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


def _ranges_of(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The elements of these rows, one row's after the other's."""
    return np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in rows])
