"""Mask columns of rollout files: which of the tokens were generated.

Of a prompt and a response, all of the response counts as generated. Where a mask says so, nothing is to be done; where
it says that the end of the response is padding, or given, that end is cut off, which changes nothing before it. Any
other mask is a refusal: without it, given tokens would count as the policy's. Rows of tokens, `token_ids`, are read by
their `loss_mask`.
"""

from __future__ import annotations

EXPECTED = (
    "expected 1 at all response tokens, or at the first of them and 0 from there on; rollouts of several turns come as "
    "token_ids and loss_mask"
)


def is_masked_row(row: dict) -> bool:
    """Whether a line holds a row of tokens with its mask, not a prompt and a response."""
    return "token_ids" in row and "loss_mask" in row


def loss_mask(where: str, row: dict, ids: list[int]) -> list[bool]:
    """Which tokens of a masked row were generated. Other columns with `mask` in their name have to say nothing more.

    Raises:
        ValueError: naming the column.
    """
    for name, value in row.items():
        if "mask" not in name.lower() or value is None or name == "loss_mask":
            continue
        if not all(_flags(f"{where}: {name}", value, inverted=name.lower().startswith("is_masked"))):
            raise ValueError(f"{where}: {name}: masks tokens beside loss_mask, expected loss_mask to say which")
    mask = _flags(f"{where}: loss_mask", row["loss_mask"], inverted=False)
    if not isinstance(row["loss_mask"], list) or len(mask) != len(ids):
        raise ValueError(f"{where}: loss_mask: {len(mask)} values for {len(ids)} tokens, expected one for each")
    if mask[:1] == [True]:
        raise ValueError(
            f"{where}: loss_mask: 1 at the first token, which nothing predicts, expected a given token before the "
            "first generated one (a start token will do)"
        )
    return mask


def cut_masked(where: str, row: dict, prompt: list[int], response: list[int], from_text: bool) -> list[int]:
    """The response without the tokens behind it that a column with `mask` in its name masks.

    Args:
        where: file and line.
        row: of the file. A mask is 0s and 1s for the response or for prompt and response, or one value for the
            rollout; `is_masked…` has them the other way round; None is none.
        from_text: the response's token ids are the tokenizer's, so a mask does not fit them.

    Raises:
        ValueError: naming the column, for every other mask.
    """
    keep = len(response)
    for name, value in row.items():
        if "mask" in name.lower() and value is not None:
            mask = _flags(f"{where}: {name}", value, inverted=name.lower().startswith("is_masked"))
            expected = len(prompt) if "prompt" in name.lower() else None
            if from_text or not isinstance(value, list) or expected is not None:
                if not all(mask) or (expected is not None and not from_text and len(mask) != expected):
                    raise ValueError(f"{where}: {name}: masks a part or all of the rollout, {EXPECTED}")
            else:
                keep = min(keep, _kept(f"{where}: {name}", mask, len(prompt), len(response)))
    return response[:keep]


def _flags(where: str, value, inverted: bool) -> list[bool]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(flag, (bool, int, float)) and flag in (0, 1) for flag in values):
        raise ValueError(f"{where}: {value!r:.40}, expected 0s and 1s")
    return [bool(flag) != inverted for flag in values]


def _kept(where: str, mask: list[bool], n_prompt: int, n_response: int) -> int:
    """How many response tokens come before the masked end."""
    if len(mask) == n_prompt + n_response and len(set(mask[:n_prompt])) == 1:
        mask = mask[n_prompt:]
    kept = sum(mask)
    if len(mask) != n_response:
        raise ValueError(f"{where}: {len(mask)} values for {n_response} response tokens, expected one for each")
    if not all(mask[:kept]) or (n_response and not kept):
        raise ValueError(f"{where}: masks tokens inside the response or all of it, {EXPECTED}")
    return kept
