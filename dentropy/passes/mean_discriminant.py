"""E_p S of S_v = p_v (log p_v + h) at every generated token: the policy-weighted mean that S* is compared with.

S_v is how fast the entropy of one softmax falls when the logit of v grows: ∂h/∂z_v = −S_v.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dentropy.model.policy import Policy
from dentropy.passes.microbatches import AUTO, Microbatch, TokenBudget, walk
from dentropy.passes.reverse_mode import CHUNK
from dentropy.rollouts.batch import PackedBatch


def mean_discriminant(
    policy: Policy, batch: PackedBatch, *, token_budget: int | str = AUTO, progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """Σ_v p_v² (log p_v + h) at every generated token of `batch`, float64 [n_tokens], in nats, from one plain pass.

    Args:
        policy, batch, token_budget, progress: as in `measure`.

    Example:
        >>> from dentropy import PackedBatch
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = PackedBatch.from_lists([tokenizer.encode("2=")], [tokenizer.encode("1+1")])
        >>> mean_discriminant(policy, batch).shape
        (3,)
    """

    def run(microbatch: Microbatch) -> Tensor:
        x, head = policy.outputs(microbatch.row)
        if head is None:
            return _of_logits(x, microbatch.temperature, None)
        transform = head.transform(microbatch.temperature)
        weight, rows = _wide(head.weight), max(1, CHUNK // head.weight.shape[0])
        bias = None if head.bias is None else _wide(head.bias)
        parts = [
            _of_logits(torch.nn.functional.linear(_wide(hidden), weight, bias), **transform) for hidden in x.split(rows)
        ]
        return torch.cat(parts)

    found = np.empty(batch.n_tokens)
    with policy.ready(), torch.no_grad():
        for microbatch, values in walk(batch, TokenBudget(token_budget, policy.device), run):
            found[microbatch.places] = values.double().cpu().numpy()
            if progress is not None:
                progress(len(microbatch.places))
    return found


def _of_logits(z: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """[rows], from raw logits [rows, V]."""
    z = _wide(z)
    logp = torch.log_softmax((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature, -1)
    p = logp.exp()
    logp = logp.masked_fill(logp == -torch.inf, 0.0)  # masked vocabulary: p is 0 there, and 0 · inf must not appear
    h = -(p * logp).sum(-1, keepdim=True)
    return (p.square() * (logp + h)).sum(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
