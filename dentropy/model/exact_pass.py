"""The self-check: which pass over a model gives what the model's own forward gives.

What is compared is what is reported: log-probability and entropy, made by the function that the passes call, against
float64 statistics of the model's own logits, row by row.
"""

import itertools
import warnings
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dentropy.doors import third_party
from dentropy.model.attention import UnseenMask
from dentropy.model.packed_row import PackedRow
from dentropy.stats.tables import TokenStats
from dentropy.stats.token_stats import token_stats

LENGTHS = np.array([5, 1, 7])
# Logits this far below the normalizer, in nats, are the mask of a vocabulary: no sum over it sees them.
MASKED = 100.0


@torch.no_grad()
def find_exact_pass(policy) -> None:
    """Settles `packs`, `splits_head`, the first combination that reproduces its model, and `vocab_size` of a Policy.

    Warns where it is not the first of all. ValueError where none does, for logits that are not finite or depend on
    later tokens, and where the model's own head would round them to half precision.
    """
    row = _row((np.arange(LENGTHS.sum()) * 7 + 3) % policy.vocab_size, LENGTHS, policy.device)
    with third_party("policy: its forward fails on short inputs", "a causal language model"):
        logits = policy.own_logits(row)
    # The second likeliest token: its log-probability follows its own logit by a half at least, and no mask hides it.
    row = replace(row, targets=logits.topk(min(2, logits.shape[-1])).indices[:, -1])
    own = _Own.of(logits, row.targets)
    if not all(torch.isfinite(x).all() for x in own):
        raise ValueError(f"policy: {_not_finite(policy.model)}, expected finite weights and logits")
    _check_causal(policy, row, own)
    policy.vocab_size = min(policy.vocab_size, logits.shape[-1])
    tried = []
    for packs, splits_head in itertools.product((True, False), repeat=2):
        policy.packs, policy.splits_head = packs, splits_head
        reason = _refusal(policy) or _failure(policy, row, own)
        if reason is None:
            _settle(policy, tried)
            return
        tried.append(reason)
    raise ValueError(
        f"policy: no pass reproduces the model's own logits ({'; '.join(tried)}), expected a causal "
        "model of transformers whose logits depend on input_ids alone"
    )


def _row(tokens: np.ndarray, lengths: np.ndarray, device) -> PackedRow:
    """Every position is scored; targets are still to come."""
    rows = np.arange(len(tokens))
    return PackedRow.of(tokens, lengths, rows, np.zeros_like(rows), device)


class _Own(NamedTuple):
    """Statistics of the model's own logits in float64, and the size of those, which rounding is relative to: [N]."""

    logp: Tensor
    entropy: Tensor
    size: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> "_Own":
        stats = token_stats(logits.double(), targets)
        masked = logits < logits.logsumexp(-1, keepdim=True) - MASKED
        return cls(stats.logp, stats.entropy, 1 + logits.masked_fill(masked, 0.0).abs().amax(-1).double())

    def difference(self, found: "TokenStats | _Own") -> float:
        """The largest difference of a log-probability or an entropy, over the size of its row's logits."""
        pairs = ((found.logp, self.logp), (found.entropy, self.entropy))
        return float(torch.stack([(x - y).abs() / self.size for x, y in pairs]).max())


def _check_causal(policy, row: PackedRow, own: _Own) -> None:
    """ValueError where the logits of a position change with the tokens after it: other tokens stand there, not fewer,
    so that a causal model computes the same products. (Doge's experts are routed so.) In half precision a warning,
    since there the order of a sum can change which experts a token visits."""
    first, kept = row.bounds[-2], 4
    tokens = row.tokens[first:].cpu().numpy().copy()
    tokens[kept:] = (tokens[kept:] + 1) % policy.vocab_size
    logits = policy.own_logits(_row(tokens, LENGTHS[-1:], policy.device))[:kept]
    before = slice(first, first + kept)
    difference = _Own(*(x[before] for x in own)).difference(_Own.of(logits, row.targets[before]))
    if difference <= _tolerance(policy.dtype):
        return
    said = (
        f"policy: {policy.config.model_type}: logits of a position change with the tokens after it (relative "
        f"difference {difference:.1e}), so that sampling and scoring see different policies"
    )
    if torch.finfo(policy.dtype).bits >= 32:
        raise ValueError(f"{said}, expected a causal model")
    warnings.warn(f"{said}, unless {policy.dtype} is to blame; dtype=torch.float32 would tell", stacklevel=5)


def _refusal(policy) -> str | None:
    """Why a combination is not tried."""
    if policy.packs and _scales_rope_by_longest(policy.config):
        return "its rotary embedding depends on the longest sequence of a packed row"
    if policy.splits_head and not policy.has_plain_head:
        return "its head is not a plain matrix behind a backbone"  # the tangent is more than that of one weight
    return None


def _scales_rope_by_longest(config) -> bool:
    """longrope takes its short or long factors by the largest position in the row, whichever sequence has it."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(kind.get("rope_type", kind.get("type")) in ("longrope", "dynamic") for kind in kinds)


def _failure(policy, row: PackedRow, own: _Own) -> str | None:
    """What a pass differs by, or refuses; None where it reproduces `own`."""
    try:
        with policy.ready():
            difference = own.difference(policy.score(row))
    except (UnseenMask, ValueError, TypeError) as error:
        if not policy.packs:
            raise
        return f"packed rows are refused: {' '.join(str(error).split())[:120]}"
    return None if difference <= _tolerance(policy.dtype) else f"relative difference {difference:.1e}"


def _tolerance(dtype: torch.dtype) -> float:
    """Largest difference, over the size of the logits, that rounding explains: a few hundred float32 units (models work
    in float32 inside, float64 ones too), a few units of the half precisions, whose roundings add up."""
    return 2e-5 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps


def _settle(policy, tried: list[str]) -> None:
    """Says which fallback was taken, and refuses the one that would round."""
    if not policy.splits_head and torch.finfo(policy.dtype).bits < 32:
        raise ValueError(
            f"policy: this model's logits come from its own head and would be rounded to {policy.dtype}, expected "
            "float32: load it with dtype=torch.float32"
        )
    said = []
    if not policy.packs:
        said.append("packed rows do not reproduce this model's logits: sequences run one at a time, eager attention")
    if not policy.splits_head:
        said.append("its head is not a plain matrix: logits come from the model's own head, all positions at once")
    if said:
        warnings.warn(f"policy: {'; '.join(said)} (tried before: {'; '.join(tried)})", stacklevel=5)


def _not_finite(model: nn.Module) -> str:
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if not bad:
        return "logits of a short input are not finite"
    return f"weights that are not finite in {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
