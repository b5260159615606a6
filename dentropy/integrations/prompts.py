"""The prompts that fresh rollouts answer: the training data's, encoded as TRL's trainers do, or those given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COLUMN = "prompt"
IMAGES = {"image", "images"}


class PromptSource:
    """Prompts to draw from: a sequence, or a map-style data set with a column "prompt".

    Args:
        prompts: texts, chat messages or lists of token ids; None means those of `dataset`.
        dataset: the training data, map-style.
        tokenizer: the trainer's, for texts and messages.
        template: settings of its chat template.

    Raises:
        ValueError: where there are no prompts, and for prompts with images.
    """

    def __init__(self, prompts: Sequence | None, dataset, tokenizer, template: dict | None = None):
        self._tokenizer, self._template = tokenizer, template or {}
        self._rows = _rows_with_prompts(dataset) if prompts is None else [{COLUMN: prompt} for prompt in prompts]
        if len(self._rows) == 0:
            raise ValueError("prompts: none, expected at least one")

    def draw(self, count: int, generator: np.random.Generator) -> tuple[list[list[int]], list[dict]]:
        """Token ids of `count` prompts, drawn at random with replacement, each a draw of its own; and their rows."""
        rows = [self._rows[int(index)] for index in generator.integers(len(self._rows), size=count)]
        return [self._encode(row[COLUMN]) for row in rows], rows

    def first(self) -> dict:
        """A row: those that `draw` gives are like it."""
        return self._rows[0]

    def _encode(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            self._check_tokenizer()
            return list(self._tokenizer(text=[prompt])["input_ids"][0])
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], dict):
            self._check_tokenizer()
            settings = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
            encoded = self._tokenizer.apply_chat_template(conversation=[prompt], **settings, **self._template)
            return list(encoded["input_ids"][0])
        return prompt

    def _check_tokenizer(self) -> None:
        if self._tokenizer is None:
            raise ValueError(
                "prompts: text for a trainer without processing_class, expected token ids, or the tokenizer as its "
                "processing_class"
            )


def _rows_with_prompts(dataset):
    """The data set itself; ValueError where prompts cannot be drawn from it."""
    expected = "expected prompts=, a list of texts, chat messages or token ids"
    if dataset is None or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(f"prompts: not given, and a {type(dataset).__name__} has no rows to draw from, {expected}")
    row = dataset[0] if len(dataset) else {}
    if not isinstance(row, dict) or COLUMN not in row:
        raise ValueError(f"prompts: not given, and the training data has no column {COLUMN!r}, {expected}")
    if IMAGES & set(row):
        raise ValueError(f"prompts: not given, and those of the training data come with images, {expected}")
    return dataset
