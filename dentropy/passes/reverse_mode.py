"""Reverse mode: the gradient of a weighted sum of token log-probabilities and entropies with respect to the weights.

    f(θ) = Σ_k (a_k h_k + b_k logp_k) ,     ∂f/∂z_k = b_k (e_y − p) − a_k p ∘ (log p + h_k) ,

summed over generated tokens with constants a, b. A policy-gradient step is a = 0 with advantages for b; the slope of
the entropy along v is ∇f·v with the estimator's coefficients. Logits exist a few rows at a time, forward and backward.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dentropy.model.in_place import in_turn
from dentropy.model.packed_row import to_device
from dentropy.model.policy import Policy
from dentropy.model.shards import own_part
from dentropy.passes import ranks
from dentropy.passes.finished import gradient_store
from dentropy.passes.first_rollouts import check_on_first
from dentropy.passes.microbatches import AUTO, Microbatch, TokenBudget, walk
from dentropy.passes.sharded_gradient import add_sharded_gradient
from dentropy.passes.unison import agree_on_gradient
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.vocabulary_parallel import HeadRows

# Logits alive at once, in elements: 64 MiB in float32, small beside the activations of a model worth the name.
CHUNK = 2**24


@ranks.together
@in_turn
def gradient(
    policy: Policy,
    batch: PackedBatch,
    parameters: Sequence[nn.Parameter],
    entropy_weight: np.ndarray,
    logp_weight: np.ndarray,
    *,
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """∂/∂θ of Σ_k (a_k h_k + b_k logp_k) over the batch's generated tokens, one tensor per parameter.

    The model and its .grad are left as found. Of sharded parameters the gradients are in parts as these are. In a
    process group each rank adds up its microbatches' gradients and all get the sum of the ranks, the same bits on each;
    their number changes its rounding.

    Args:
        policy, batch: as in `measure`.
        parameters: of the policy's model; frozen ones are fine.
        entropy_weight, logp_weight: a and b, float [n_tokens], packed in rollout order.
        token_budget, progress: as in `measure`.

    Returns:
        A tensor of each parameter's shape, float32 or better.
    """
    check_on_first(policy, batch)
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    if policy.is_sharded and not policy.in_unison:
        weighted = partial(_weighted_sum, policy, entropy_weight=entropy_weight, logp_weight=logp_weight)
        add_sharded_gradient(
            policy, batch, parameters, total, weighted, TokenBudget(token_budget, policy.device), progress
        )
        return total
    store = None if policy.in_unison else gradient_store()
    known = None if store is None else store.read_gradient()
    if known is not None:
        _add(total, [part.to(sum_.device) for sum_, part in zip(total, known, strict=True)])
    if not any(ranks.exchange(known is not None)):
        _run(policy, batch, parameters, total, entropy_weight, logp_weight, token_budget, progress)
    elif progress is not None:
        progress(batch.n_tokens)
    if policy.in_unison:
        agree_on_gradient(total)
    else:
        ranks.sum_over_ranks(total)
    if store is not None and known is None:
        store.write_gradient(total)
    return total


def _run(policy, batch, parameters, total, entropy_weight, logp_weight, token_budget, progress) -> None:
    """Adds this rank's part of the gradient to `total`."""
    frozen = [p for p in parameters if not p.requires_grad]
    # Hooks of tensor parallel modules may sum over ranks what they find in .grad.
    held = [(p, p.grad) for p in policy.model.parameters()] if policy.in_unison else []

    def run(microbatch: Microbatch) -> tuple[Tensor | None, ...]:
        value = _weighted_sum(policy, microbatch, entropy_weight, logp_weight)
        return torch.autograd.grad(value, parameters, allow_unused=True)

    try:
        for p in frozen:
            p.requires_grad_(True)
        for p, _ in held:
            p.grad = None
        budget = TokenBudget(token_budget, policy.device)
        with policy.ready(), torch.enable_grad():
            for microbatch, parts in walk(batch, budget, run, in_unison=policy.in_unison):
                if parts is not None:
                    _add(total, parts)
                del parts  # as large as the model: not to be held through the next microbatch
                if progress is not None:
                    progress(len(microbatch.places))
    finally:
        for p, grad in held:
            p.grad = grad
        for p in frozen:
            p.requires_grad_(False)


def _add(total: list[Tensor], parts: Sequence[Tensor | None]) -> None:
    for sum_, part in zip(total, parts, strict=True):
        if part is not None:
            own_part(sum_).add_(own_part(part))


def _weighted_sum(policy, microbatch, entropy_weight, logp_weight) -> Tensor:
    """Σ (a h + b logp) over the generated tokens of a microbatch, differentiable in the weights."""
    row = microbatch.row
    x, head = policy.outputs(row)
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = (to_device(w[microbatch.places], x.device).to(dtype) for w in (entropy_weight, logp_weight))
    if head is None:
        logp = torch.log_softmax(x.to(dtype) / microbatch.temperature, -1)
        entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)  # masked vocabulary: no 0 · inf
        return (a * entropy + b * logp.gather(-1, row.targets[:, None])[:, 0]).sum()
    settings = head.transform(microbatch.temperature) | dict(bias=head.bias, process_group=head.group)
    return weighted_token_sum(x, head.weight, row.targets, a, b, **settings)


def weighted_token_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    entropy_weight: Tensor,
    logp_weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    process_group=None,
) -> Tensor:
    """Σ_k (a_k h_k + b_k logp_k) from hidden states and head, differentiable once in hidden, weight and bias.

    hidden [N, D], weight [V, D], bias [V] or None, targets int64 [N]; entropy_weight (a) and logp_weight (b) [N] are
    constants. Scalar result in float32, or float64 where hidden is. Never more than a chunk of the [N, V] logits is
    stored: their gradient is formed in the forward pass, chunk by chunk, as in fused cross-entropies.

    process_group: of ranks that hold rows of the head each, in their order: weight and bias are this rank's, everything
    else is the same on all of them. Each gets the sum, the gradient of its rows, and the whole of that of `hidden`.
    """
    rows = HeadRows(len(weight), process_group, weight.device)
    return _WeightedTokenSum.apply(
        hidden, weight, bias, targets, entropy_weight, logp_weight, temperature, softcap, rows
    )


class _WeightedTokenSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, a, b, temperature, softcap, head):
        wide, matrix = _at_least_float32(hidden), _at_least_float32(weight)
        value = wide.new_zeros(())
        dhidden = torch.empty_like(wide)
        dweight = torch.zeros_like(matrix) if weight.requires_grad else None
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide.dtype)
        rows = max(1, CHUNK // head.most)  # the same on every rank
        # Products of full float32, on ordinary cores. Three TF32 ones in place of each would be on tensor cores, but
        # the library would choose how their long sums are cut, and whole ones lose digits there (kernels/products.py).
        for c in (slice(i, i + rows) for i in range(0, len(hidden), rows)):
            z = wide[c] @ matrix.T
            if bias is not None:
                z += bias
            part, dz = _of_logits(z, targets[c], a[c, None], b[c, None], temperature, softcap, head)
            value += part
            torch.mm(dz, matrix, out=dhidden[c])
            if dweight is not None:
                dweight.addmm_(dz.T, wide[c])
            if dbias is not None:
                dbias += dz.sum(0)
        head.over_ranks(dhidden)
        ctx.gradients = (
            dhidden.to(hidden.dtype),
            None if dweight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
        )
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *(None if g is None else g * upstream for g in ctx.gradients), None, None, None, None, None, None


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _of_logits(
    z: Tensor, targets: Tensor, a: Tensor, b: Tensor, temperature: float, softcap: float | None, head: HeadRows
) -> tuple[Tensor, Tensor]:
    """(Σ (a h + b logp), its gradient with respect to z) for raw logits z [rows, V]; a, b [rows, 1]."""
    t = None if softcap is None else torch.tanh(z / softcap)
    logp = head.log_softmax((z if t is None else softcap * t) / temperature)
    p = logp.exp()
    at, here = head.places(targets[:, None])
    at_target = head.over_ranks(logp.gather(-1, at).masked_fill(~here, 0.0))
    logp.masked_fill_(logp == -torch.inf, 0.0)  # masked vocabulary: p is 0 there, and 0 · inf must not appear
    h = -head.over_ranks((p * logp).sum(-1, keepdim=True))
    dz = p.neg_().mul_(logp.add_(h).mul_(a).add_(b))
    dz.scatter_add_(-1, at, b.masked_fill(~here, 0.0))
    dz /= temperature
    return (a * h + b * at_target).sum(), dz if t is None else dz.mul_(1 - t * t)
