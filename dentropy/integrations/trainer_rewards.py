"""The rewards of fresh rollouts, by the reward functions of TRL's trainers (GRPO, RLOO), called as these call them."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from dentropy.doors import reason
from dentropy.integrations.prompts import COLUMN
from dentropy.rollouts.batch import PackedBatch

NOT_COLUMNS = {COLUMN, "completion", "completion_ids"}  # of the data, for a reward function


class TrainerRewards:
    """The reward of each rollout: the functions' weighted sum, in which None counts as 0, as the trainer has it.

    Args:
        trainer: GRPO's or RLOO's, one for which `not_here` finds no reason against it.
    """

    def __init__(self, trainer):
        self._trainer = trainer

    def of(self, batch: PackedBatch, rows: Sequence[dict]) -> np.ndarray:
        """float64 [S], NaN where every function gives None; `rows` are the training data's, one for each prompt.

        What the functions log goes nowhere. ValueError, which names the function, where one fails.
        """
        given = self._arguments(batch, [copy.deepcopy(rows[prompt]) for prompt in batch.group])
        found = np.array([_called(function, given, len(batch)) for function in self._trainer.reward_funcs])
        weights = np.array([float(weight) for weight in self._trainer.reward_weights])
        return np.where(np.isnan(found).all(axis=0), math.nan, np.nansum(found * weights[:, None], axis=0))

    def _arguments(self, batch: PackedBatch, rows: list[dict]) -> dict:
        """What a reward function gets, by keyword."""
        ids = [batch.response(index) for index in range(len(batch))]
        texts = self._trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        prompts = [row[COLUMN] for row in rows]
        completions = [[{"role": "assistant", "content": text}] for text in texts] if _is_chat(prompts[0]) else texts
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in NOT_COLUMNS}
        given = {"prompts": prompts, "completions": completions, "completion_ids": ids}
        nowhere = {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}
        return columns | given | {"trainer_state": self._trainer.state} | nowhere


def not_here(trainer, row: dict) -> str | None:
    """Why the trainer's rewards of other rollouts than its own are not to be had, in words; None where they are.

    `row` is one of the training data's.
    """
    for name in ("rollout_func", "tools", "environment_factories"):
        if getattr(trainer, name, None):
            return f"its rollouts are made with {name}"
    for function in trainer.reward_funcs:
        if isinstance(function, nn.Module):
            return f"{_name(function)} is a model"
        if _is_async(function):
            return f"{_name(function)} is async"
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    parsed = any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))
    return "its tokenizer parses answers by a schema" if parsed and _is_chat(row[COLUMN]) else None


def _called(function, given: dict, expected: int) -> list[float]:
    """One number per rollout, NaN for None."""
    try:
        found = [math.nan if reward is None else float(reward) for reward in function(**given)]
    except Exception as error:
        raise ValueError(f"reward_funcs: {_name(function)} failed on fresh rollouts: {reason(error)}") from error
    if len(found) != expected:
        raise ValueError(f"reward_funcs: {_name(function)} gave {len(found)} rewards, expected {expected}")
    return found


def _is_chat(prompt) -> bool:
    return not isinstance(prompt, str)


def _is_async(function) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _name(function) -> str:
    return getattr(function, "__name__", type(function).__name__)
