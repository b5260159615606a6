"""Sampling rollouts from a policy: exactly from softmax(z / temperature), and nothing else.

Importance weights and entropies are those of the distribution the tokens were drawn from. The settings that
checkpoints ship for `generate` (top-k, top-p, repetition penalty, suppressed tokens, ...) would draw from
another one, so none of them is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.columns import checked_temperature, token_ids
from dentropy.rollouts.ends import as_tuple
from dentropy.rollouts.readers import json_lines, tokens_of
from dentropy.rollouts.text import TextReader

FEW = 32  # rows: taking out those that have ended gains nothing where there are fewer


class DrawStore(Protocol):
    """The parts of one draw that are finished, by their number: each part's responses, and the state of the random
    numbers behind it."""

    def read_drawn(self, part: int) -> tuple[list[list[int]], torch.Tensor] | None: ...

    def write_drawn(self, part: int, responses: list[list[int]], state: torch.Tensor) -> None:
        """Whole or, where the process dies, not at all."""


def sample(
    policy,
    prompts: Sequence[Sequence[int]],
    *,
    per_prompt: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    store: DrawStore | None = None,
) -> PackedBatch:
    """Draw `per_prompt` responses to each prompt from the policy at `temperature`.

    The draw is fixed by `seed` (on one machine and one `batch_size`), and the global random state is left as it was.

    Args:
        policy: a Policy; its weights as they are now.
        prompts: lists of token ids.
        per_prompt: responses to each.
        max_new_tokens: where a response is cut off that draws no end token.
        temperature: logits are divided by it.
        seed: of the draw.
        eos_token_id: what ends a response, and belongs to it. None means the model's own end tokens (`end_tokens`),
            an empty list none at all.
        batch_size: rows generated at a time.
        progress: called with the numbers of rollouts and of tokens just finished.
        store: of this very draw: `batch_size` rows at a time are kept there, and those that are there not drawn again.

    Returns:
        A batch of len(prompts)·per_prompt rollouts in the order of the prompts; `group` is the prompt's index, also
        where prompts are equal: each is a draw of its own.

    Raises:
        ValueError: for prompts that are empty or have ids outside the vocabulary, a temperature that is not positive,
            counts below 1, and more new tokens than the policy has positions for.

    Example:
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = sample(policy, [tokenizer.encode("17=")], per_prompt=4, max_new_tokens=33)
        >>> len(batch), batch.n_groups
        (4, 1)
    """
    if policy.is_sharded:
        raise ValueError("policy: sharded weights, expected whole ones to sample from")
    prompts = _checked_prompts(prompts, policy)
    _check_request(policy, prompts, per_prompt, max_new_tokens, batch_size, temperature)
    ends = end_tokens(policy) if eos_token_id is None else as_tuple(eos_token_id)

    group = [index for index in range(len(prompts)) for _ in range(per_prompt)]
    by_length = sorted(range(len(group)), key=lambda row: len(prompts[group[row]]))  # little padding
    responses: list[list[int]] = [[] for _ in group]
    with policy.turn, _clean_generation(policy.model), _seeded(policy.device, seed):
        for part, start in enumerate(range(0, len(by_length), batch_size)):
            rows = by_length[start : start + batch_size]
            found = None if store is None else store.read_drawn(part)
            if found is not None:
                drawn, state = found
                _random_numbers(policy.device).set_rng_state(state)
            else:
                drawn = _generate(policy, [prompts[group[row]] for row in rows], max_new_tokens, temperature, ends)
                if store is not None:
                    store.write_drawn(part, drawn, _random_numbers(policy.device).get_rng_state())
            for row, response in zip(rows, drawn, strict=True):
                responses[row] = response
            if progress is not None:
                progress(len(rows), sum(map(len, drawn)))
    return PackedBatch.from_lists([prompts[g] for g in group], responses, group=group, temperature=temperature)


def end_tokens(policy) -> tuple[int, ...]:
    """The model's own end tokens: from its generation config, else from its config; () where it has none."""
    for config in (policy.model.generation_config, policy.model.config):
        if config is not None and getattr(config, "eos_token_id", None) is not None:
            return as_tuple(config.eos_token_id)
    return ()


def without_end(batch: PackedBatch, ends: Sequence[int]) -> int | None:
    """How many rollouts do not end with one of the tokens `ends`; None where there are no such tokens."""
    if not ends:
        return None
    last = batch.tokens[torch.from_numpy(batch.offsets[1:] - 1)]
    ended = torch.isin(last, torch.tensor(ends)).numpy() & (batch.response_lens > 0)
    return int(np.sum(~ended))


def read_prompts(path: str | Path, tokenizer=None) -> list[list[int]]:
    """Token ids of the prompts in a JSONL file, one per line.

    A line holds `"prompt_ids"` (a list of token ids) or `"prompt"`: a text, or a list of chat messages, to which the
    tokenizer's chat template is applied: with the generation prompt added, or, where the last message is the
    assistant's, left open behind it. Prompts are encoded as `PackedBatch.from_jsonl` encodes them.

    Raises:
        ValueError: naming the line, for one that is none of these and where a tokenizer is needed but not given.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "prompts.jsonl")
        ...     _ = path.write_text('{"prompt_ids": [3, 4]}\\n{"prompt_ids": [5]}\\n')
        ...     read_prompts(path)
        [[3, 4], [5]]
    """
    text = TextReader(tokenizer)
    prompts = [
        tokens_of(where, row, ("prompt_ids",), ("prompt",), text.prompt) for where, row in json_lines(Path(path))
    ]
    if not prompts:
        raise ValueError(f"{path}: no prompts, expected one JSON object per line")
    return prompts


def _checked_prompts(prompts, policy) -> list[list[int]]:
    if len(prompts) == 0:
        raise ValueError("prompts: none, expected at least one")
    checked = [token_ids(prompt, "prompts", index).tolist() for index, prompt in enumerate(prompts)]
    for index, ids in enumerate(checked):
        if not ids:
            raise ValueError(f"prompts[{index}]: empty, expected at least one token (a start token will do)")
        if max(ids) >= policy.vocab_size:
            raise ValueError(
                f"prompts[{index}]: token id {max(ids)} is outside the vocabulary, "
                f"expected ids below {policy.vocab_size}"
            )
    return checked


def _check_request(policy, prompts, per_prompt, max_new_tokens, batch_size, temperature) -> None:
    for name, count in (("per_prompt", per_prompt), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name}: {count}, expected at least 1")
    checked_temperature(temperature)
    longest = max(map(len, prompts))
    if policy.max_positions is not None and longest + max_new_tokens > policy.max_positions:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens, expected at most "
            f"{policy.max_positions - longest}: the policy has {policy.max_positions} positions"
        )


def _generate(policy, prompts, max_new_tokens, temperature, ends) -> list[list[int]]:
    """One batch of responses, cut after the first end token. Where half of the rows have ended, the others go on
    without them."""
    from transformers import GenerationConfig, GenerationMixin

    longest = max(map(len, prompts))
    renamed = "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters
    name = "cache" if renamed else "past_key_values"
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=policy.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=policy.device)
    responses, rows, cache = [[] for _ in prompts], np.arange(len(prompts)), None
    while len(rows):
        config = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=longest + max_new_tokens - ids.shape[1],
            eos_token_id=list(ends) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        further = {} if cache is None else {name: cache}
        settings = dict(attention_mask=mask, generation_config=config, stopping_criteria=[_half_ended(longest, ends)])
        found = policy.model.generate(ids, **settings, **further)
        drawn = found.sequences[:, longest:]
        over = torch.isin(drawn, torch.tensor(ends, dtype=torch.int64, device=drawn.device)).any(1)
        over |= drawn.shape[1] == max_new_tokens
        for row in np.flatnonzero(over.cpu()):
            responses[rows[row]] = _cut(drawn[row].tolist(), ends)
        left = torch.nonzero(~over)[:, 0]
        grown = torch.ones(len(mask), found.sequences.shape[1] - ids.shape[1], dtype=mask.dtype, device=mask.device)
        ids, mask, rows = found.sequences[left], torch.cat([mask, grown], 1)[left], rows[left.cpu().numpy()]
        cache = _of_rows(getattr(found, name), left)
    return responses


def _half_ended(start: int, ends: tuple[int, ...]) -> Callable[..., torch.Tensor]:
    """A stopping criterion for `generate`: all rows stop where half of them, of at least FEW, have ended."""

    def stop(ids: torch.Tensor, scores, **_) -> torch.Tensor:
        ended = torch.isin(ids[:, start:], torch.tensor(ends, dtype=torch.int64, device=ids.device)).any(1)
        return ((2 * ended.sum() >= len(ids)) & (len(ids) >= FEW)).expand(len(ids))

    return stop


def _of_rows(cache, rows: torch.Tensor):
    """The rows of a cache of plain keys and values; None for another, which is made again from the tokens."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.batch_select_indices(rows)
    return cache


def _cut(response: list[int], ends: tuple[int, ...]) -> list[int]:
    """Up to the first end token, with it; what follows is padding, whatever its id."""
    for position, token in enumerate(response):
        if token in ends:
            return response[: position + 1]
    return response


@contextmanager
def _clean_generation(model) -> Iterator[None]:
    """Eval mode, and no settings but ours: `generate` fills the gaps of a given config from the model's."""
    from transformers import GenerationConfig

    # PEFT hands the settings of its wrapper down to the model inside, and leaves them there.
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    settings = [(owner, owner.generation_config) for owner in owners]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, found in settings:
            owner.generation_config = found
        for module, training in modes:
            module.training = training


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The device's generator at `seed`; every generator that is touched gets its state back afterwards."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    else:
        backend = torch.get_device_module(device)
        with torch.random.fork_rng(devices=[device], device_type=device.type), backend.device(device):
            backend.manual_seed(seed)
            yield


def _random_numbers(device: torch.device):
    """The module with the state of those that sampling on the device, inside `_seeded`, draws from."""
    return torch if device.type == "cpu" else torch.get_device_module(device)
