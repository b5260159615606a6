"""The rollouts that TRL's on-policy trainers (GRPO, RLOO) sampled for their next step.

They lie in the trainer's `_buffered_inputs`, a list of padded batches made anew whenever it samples.
"""

from __future__ import annotations

from dentropy.passes import ranks
from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.reading import UNCUT

BUFFER = "_buffered_inputs"
SAMPLER = "sampling_per_token_logps"  # there where an engine samples and its ratio to the policy is corrected for


def buffered(trainer) -> list[dict] | None:
    """What the trainer sampled last; None for a trainer that does not sample."""
    return getattr(trainer, BUFFER, None)


def not_the_policys(args) -> str | None:
    """Why what the trainer samples does not judge its policy, in words; None where it does."""
    for name, uncut in UNCUT.items():
        if (value := getattr(args, name, None)) not in uncut:
            return f"it samples with {name}={value}, from another distribution than the policy's"
    if getattr(args, "generation_kwargs", None):
        return f"it samples with generation_kwargs={args.generation_kwargs}"
    if getattr(args, "mask_truncated_completions", False):
        return "mask_truncated_completions leaves out the longest responses"
    return None


def packed(buffer: list[dict], temperature: float) -> PackedBatch | None:
    """The rollouts of all its batches, of all ranks, grouped by prompt; None where tools wrote part of them.

    What an engine gave their tokens goes with them, where the trainer keeps it: they are the engine's rollouts.
    """
    found = ranks.exchange(_own(buffer))
    if any(own is None for own in found):
        return None
    prompts, responses, logps = ([row for own in found for row in own[column]] for column in range(3))
    return PackedBatch.from_lists(
        prompts,
        responses,
        group=[tuple(prompt) for prompt in prompts],
        temperature=temperature,
        sampler_logp=logps or None,
    )


def _own(buffer: list[dict]) -> tuple[list, list, list] | None:
    """(prompts, responses, log-probabilities by an engine, if any) of this rank; None where tools wrote part."""
    prompts, responses, logps = [], [], []
    for part in buffer:
        if "tool_mask" in part:
            return None
        prompts += _kept(part["prompt_ids"], part["prompt_mask"])
        responses += _kept(part["completion_ids"], part["completion_mask"])
        if SAMPLER in part:
            logps += _kept(part[SAMPLER], part["completion_mask"])
    return prompts, responses, logps


def _kept(values, mask) -> list[list]:
    """Of each row of a padded tensor what the mask keeps."""
    rows = zip(values.tolist(), mask.bool().tolist(), strict=True)
    return [[value for value, kept in zip(*row, strict=True) if kept] for row in rows]
