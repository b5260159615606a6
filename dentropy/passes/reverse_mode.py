"""Reverse mode: the gradient of a weighted sum of token log-probabilities and entropies with respect to the weights.

    f(θ) = Σ_k (a_k h_k + b_k logp_k) ,     ∂f/∂z_k = b_k (e_y − p) − a_k p ∘ (log p + h_k) ,

summed over response tokens with constants a, b. A policy-gradient step is a = 0 with advantages for b; the slope of the
entropy along v is ∇f·v with the estimator's coefficients. Logits exist a few rows at a time, forward and backward.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dentropy.model.policy import Policy, at_least_float32
from dentropy.passes.microbatches import AUTO, TokenBudget, packed_inputs, response_places, walk
from dentropy.rollouts.batch import PackedBatch

# Logits alive at once, in elements: 64 MiB in float32, small beside the activations of a model worth the name.
CHUNK = 2**24


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
    """∂/∂θ of Σ_k (a_k h_k + b_k logp_k) over the batch's response tokens, one tensor per parameter.

    entropy_weight (a), logp_weight (b): float [n_tokens], packed in rollout order. Frozen parameters are fine; the
    model and its .grad are left as found. token_budget and progress as in `measure`. The result is float32 or better.
    """
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    frozen = [p for p in parameters if not p.requires_grad]
    budget = TokenBudget(token_budget, policy.device)

    def run(rollouts: np.ndarray) -> tuple[Tensor | None, ...]:
        value = _weighted_sum(policy, batch, rollouts, entropy_weight, logp_weight)
        return torch.autograd.grad(value, parameters, allow_unused=True)

    def keep(_rollouts: np.ndarray, parts: tuple[Tensor | None, ...]) -> None:
        for sum_, part in zip(total, parts, strict=True):
            if part is not None:
                sum_ += part

    try:
        for p in frozen:
            p.requires_grad_(True)
        with policy.ready(), torch.enable_grad():
            walk(batch, budget, run, keep, progress)
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return total


def _weighted_sum(policy, batch, rollouts, entropy_weight, logp_weight) -> Tensor:
    """Σ (a h + b logp) over the response tokens of `rollouts`, differentiable in the weights."""
    tokens, cu_seqlens, rows, targets = packed_inputs(batch, rollouts, policy.device)
    places = response_places(batch, rollouts)
    x = (policy.hidden if policy.splits_head else policy.logits)(tokens, cu_seqlens)[rows]
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = (torch.from_numpy(w[places]).to(x.device, dtype) for w in (entropy_weight, logp_weight))
    if not policy.splits_head:
        logp = torch.log_softmax(at_least_float32(x) / batch.temperature, -1)
        entropy = -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)
        return (a * entropy + b * logp.gather(-1, targets[:, None])[:, 0]).sum()
    head = policy.head()
    softcap = None if head.softcap is None else head.softcap / head.scale
    return weighted_token_sum(
        x, head.weight, targets, a, b, bias=head.bias, softcap=softcap, temperature=batch.temperature / head.scale
    )


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
) -> Tensor:
    """Σ_k (a_k h_k + b_k logp_k) from hidden states and head, differentiable once in hidden, weight and bias.

    hidden [N, D], weight [V, D], bias [V] or None, targets int64 [N]; entropy_weight (a) and logp_weight (b) [N] are
    constants. Scalar result in float32, or float64 where hidden is. Never more than a chunk of the [N, V] logits is
    stored: their gradient is formed in the forward pass, chunk by chunk, as in fused cross-entropies.
    """
    return _WeightedTokenSum.apply(hidden, weight, bias, targets, entropy_weight, logp_weight, temperature, softcap)


class _WeightedTokenSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, a, b, temperature, softcap):
        wide, matrix = at_least_float32(hidden), at_least_float32(weight)
        value = wide.new_zeros(())
        dhidden = torch.empty_like(wide)
        dweight = torch.zeros_like(matrix) if weight.requires_grad else None
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide.dtype)
        rows = max(1, CHUNK // weight.shape[0])
        for c in (slice(i, i + rows) for i in range(0, len(hidden), rows)):
            z = wide[c] @ matrix.T
            if bias is not None:
                z += bias
            part, dz = _of_logits(z, targets[c], a[c, None], b[c, None], temperature, softcap)
            value += part
            torch.mm(dz, matrix, out=dhidden[c])
            if dweight is not None:
                dweight.addmm_(dz.T, wide[c])
            if dbias is not None:
                dbias += dz.sum(0)
        ctx.gradients = (
            dhidden.to(hidden.dtype),
            None if dweight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
        )
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *(None if g is None else g * upstream for g in ctx.gradients), None, None, None, None, None


def _of_logits(
    z: Tensor, targets: Tensor, a: Tensor, b: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(Σ (a h + b logp), its gradient with respect to z) for raw logits z [rows, V]; a, b [rows, 1]."""
    t = None if softcap is None else torch.tanh(z / softcap)
    logp = torch.log_softmax((z if t is None else softcap * t) / temperature, -1)
    p = logp.exp()
    at_target = logp.gather(-1, targets[:, None])
    logp.masked_fill_(logp == -torch.inf, 0.0)  # masked vocabulary: p is 0 there, and 0 · inf must not appear
    h = -(p * logp).sum(-1, keepdim=True)
    dz = p.neg_().mul_(logp.add_(h).mul_(a).add_(b))
    dz.scatter_add_(-1, targets[:, None], b)
    dz /= temperature
    return (a * h + b * at_target).sum(), dz if t is None else dz.mul_(1 - t * t)
