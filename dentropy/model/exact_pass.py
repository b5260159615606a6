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
from dentropy.model.adapter_layers import unusual_adapters
from dentropy.model.attention import CHECKED, UnseenMask
from dentropy.model.packed_row import PackedRow
from dentropy.model.shards import whole
from dentropy.stats.tables import TokenStats
from dentropy.stats.token_stats import token_stats

LENGTHS = np.array([5, 1, 7])
# Logits this far below the normalizer, in nats, are the mask of a vocabulary: no sum over it sees them.
MASKED = 100.0


@torch.no_grad()
def find_exact_pass(policy) -> PackedRow:
    """Settles `packs`, `splits_head`, the first combination that reproduces its model, and `vocab_size` of a Policy.

    Warns where it is not the first of all. ValueError where none does, for logits that are not finite or depend on
    later tokens, and where the model's own head would round them to half precision. Returns the row that was tried.
    """
    tokens = np.random.default_rng(0).integers(policy.vocab_size, size=LENGTHS.sum())
    row, own, policy.vocab_size = _tried(policy, _row(tokens, LENGTHS, policy.device))
    if not all(torch.isfinite(x).all() for x in own):
        raise ValueError(f"policy: {_not_finite(policy.model)}, expected finite weights and logits")
    _check_causal(policy, row, own)
    tried = []
    for packs, splits_head in itertools.product((True, False), repeat=2):
        policy.packs, policy.splits_head = packs, splits_head
        reason = _refusal(policy) or _failure(policy, row, own)
        if reason is None:
            _settle(policy, tried)
            return row
        tried.append(reason)
    raise ValueError(
        f"policy: {_more_than_weights(policy)}no pass reproduces the model's own logits ({'; '.join(tried)}), expected "
        "a causal model of transformers whose logits depend on input_ids alone"
    )


@torch.no_grad()
def check_on_rollouts(policy, sequences: list[np.ndarray]) -> None:
    """ValueError where the settled pass and the model's own forward differ on these sequences of token ids, as they do
    where a wrapper or an adapter waits for something in its input. A warning where rounding may be to blame."""
    tried = [_tried(policy, _row(tokens, np.array([len(tokens)]), policy.device)) for tokens in sequences]
    own = _Own(*(torch.cat(parts) for parts in zip(*(own for _, own, _ in tried), strict=True)))
    if not all(torch.isfinite(x).all() for x in own):
        return  # of which rollout, the pass says
    row = _row(np.concatenate(sequences), np.array([len(tokens) for tokens in sequences]), policy.device)
    row = replace(row, targets=torch.cat([alone.targets for alone, _, _ in tried]))
    with policy.ready(compiled=False):
        difference = own.difference(policy.score(row))
    if not difference <= _tolerance(policy.dtype):
        choice = "a choice of experts that rounding changes is to blame" if _chooses_experts(policy.config) else None
        _refuse(
            policy,
            f"its own forward and the pass differ on these rollouts (relative difference {difference:.1e})",
            "a model whose forward depends on input_ids alone and does no more than the model that dentropy runs",
            blamed=_half_precision(policy) or choice,
        )


def _row(tokens: np.ndarray, lengths: np.ndarray, device) -> PackedRow:
    """Every position is scored; targets are still to come."""
    rows = np.arange(len(tokens))
    return PackedRow.of(tokens, lengths, rows, np.zeros_like(rows), device)


def _tried(policy, row: PackedRow) -> "tuple[PackedRow, _Own, int]":
    """The row with targets, what the model's own forward says of them, and the size of its vocabulary.

    The target is the second likeliest token: its log-probability follows its own logit by a half at least, and no mask
    hides it.
    """
    with third_party("policy: its forward fails on short inputs", "a causal language model"):
        logits = policy.own_logits(row)
    if len(logits) != len(row.tokens):
        raise ValueError(
            f"policy: {_more_than_weights(policy)}its forward gives {len(logits)} rows of logits for {len(row.tokens)} "
            "tokens, expected one for each (no soft prompts)"
        )
    row = replace(row, targets=logits.topk(min(2, logits.shape[-1])).indices[:, -1])
    return row, _Own.of(logits, row.targets), min(policy.vocab_size, logits.shape[-1])


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
    _refuse(
        policy,
        f"{policy.config.model_type}: logits of a position change with the tokens after it (relative difference "
        f"{difference:.1e}), so that sampling and scoring see different policies",
        "a causal model",
        blamed=_half_precision(policy),
    )


def _refuse(policy, finding: str, expected: str, *, blamed: str | None) -> None:
    """ValueError for what was found; a warning where something else can be blamed for it."""
    said = f"policy: {_more_than_weights(policy)}{finding}"
    if blamed is None:
        raise ValueError(f"{said}, expected {expected}")
    warnings.warn(f"{said}, unless {blamed}", stacklevel=6)


def _half_precision(policy) -> str | None:
    if torch.finfo(policy.dtype).bits >= 32:
        return None
    return f"{policy.dtype} is to blame; dtype=torch.float32 would tell"


def _chooses_experts(config) -> bool:
    return any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def _more_than_weights(policy) -> str:
    """What is known of a model that may do more than its weights say: its adapters, its wrapper."""
    adapters = unusual_adapters(policy.model)
    if adapters:
        return f"{adapters}, whose effect may depend on the input: "
    if _wraps(policy.model):
        return f"{type(policy.model).__name__}, a wrapper with a forward of its own: "
    return ""


def _wraps(model: nn.Module) -> bool:
    """Whether a model stands before another and is not PEFT's, which adds nothing but what its adapters do."""
    return hasattr(model, "get_base_model") and not hasattr(model, "peft_config")


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
        with policy.ready(CHECKED):
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
    bad = [name for name, p in model.named_parameters() if not whole(torch.isfinite(p).all())]
    if not bad:
        return "logits of a short input are not finite"
    return f"weights that are not finite in {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
