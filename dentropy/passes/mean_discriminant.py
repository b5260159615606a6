"""E_p S of S_v = p_v (log p_v + h) at every generated token: the policy-weighted mean that S* is compared with.

S_v is how fast the entropy of one softmax falls when the logit of v grows: ∂h/∂z_v = −S_v.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.passes import ranks
from dentropy.passes.first_rollouts import check_on_first
from dentropy.passes.measure import check_batch
from dentropy.passes.microbatches import AUTO, Microbatch, TokenBudget, walk
from dentropy.passes.reverse_mode import CHUNK
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.vocabulary_parallel import HeadRows


@in_turn
def mean_discriminant(
    policy: Policy, batch: PackedBatch, *, token_budget: int | str = AUTO, progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """Σ_v p_v² (log p_v + h) at every generated token of `batch`, float64 [n_tokens], in nats, from one plain pass.

    Args:
        policy, batch, token_budget, progress: as in `measure`.

    Raises:
        ValueError: as `measure` does of a batch.

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
            return _of_logits(x, HeadRows(x.shape[-1], None, x.device), microbatch.temperature, None)
        own = HeadRows(len(head.weight), head.group, x.device)
        transform = head.transform(microbatch.temperature)
        weight, rows = _wide(head.weight), max(1, CHUNK // own.most)
        bias = None if head.bias is None else _wide(head.bias)
        parts = [
            _of_logits(torch.nn.functional.linear(_wide(hidden), weight, bias), own, **transform)
            for hidden in x.split(rows)
        ]
        return torch.cat(parts)

    check_batch(policy, batch)
    check_on_first(policy, batch)
    found = torch.zeros(batch.n_tokens, dtype=torch.float64)
    with policy.ready(), torch.no_grad():
        budget, idle = TokenBudget(token_budget, policy.device), run if policy.is_sharded else None
        for microbatch, values in walk(batch, budget, run, idle=idle, in_unison=policy.in_unison):
            if values is not None:
                found[torch.from_numpy(microbatch.places)] = values.double().cpu()
            if progress is not None:
                progress(len(microbatch.places))
    if not policy.in_unison:
        ranks.sum_over_ranks([found])  # each place is another rank's 0
    return found.numpy()


def _of_logits(z: Tensor, head: HeadRows, temperature: float, softcap: float | None) -> Tensor:
    """[rows], from raw logits z [rows, V]."""
    z = _wide(z)
    logp = head.log_softmax((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature)
    p = logp.exp()
    logp = logp.masked_fill(logp == -torch.inf, 0.0)  # masked vocabulary: p is 0 there, and 0 · inf must not appear
    h = -head.over_ranks((p * logp).sum(-1, keepdim=True))
    return head.over_ranks((p.square() * (logp + h)).sum(-1))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
