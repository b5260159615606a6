"""Rollouts through a model in plain PyTorch, one at a time and unpacked: its own eager attention, its own logits.

In float64 on a CPU that is the truth; in another dtype on another device it is what rounding costs anybody there.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from models import InFloat64
from torch.func import functional_call
from truth import FIELDS, values_and_derivatives

from dentropy import PackedBatch, TokenStats

TEMPERATURE = 0.8  # of every batch that these functions are given


def own_precision(model):
    """Norms, rotary embeddings and softmax in float64 too, where the weights are."""
    return InFloat64() if model.dtype == torch.float64 else nullcontext()


def token_values(model, batch: PackedBatch, direction: dict, order: int, eta: float = 0.0) -> TokenStats:
    """Statistics of every response token at θ + eta·v, and their derivatives along v, on the CPU in float64.

    θ + eta·v is rounded to the model's dtype, as moved weights are.
    """
    weights = {name: torch.add(p.detach(), direction[name], alpha=eta) for name, p in model.named_parameters()}
    parts = []
    with own_precision(model):
        for logits_of, targets in _rollouts(model, batch):

            def log_prob_and_entropy(step, logits_of=logits_of, targets=targets):
                logits = logits_of({name: w + step * direction[name] for name, w in weights.items()})
                return _log_prob_and_entropy(logits, targets)

            orders = values_and_derivatives(log_prob_and_entropy, order, model.device)
            parts.append([x.detach().cpu().double() for values in orders for x in values])
    return TokenStats(**dict(zip(FIELDS, map(torch.cat, zip(*parts, strict=True)))))


def gradient(model, batch: PackedBatch, entropy_weight, logp_weight) -> dict[str, torch.Tensor]:
    """∂/∂θ of Σ_k (a_k h_k + b_k logp_k) by autograd, on the CPU in float64."""
    named = dict(model.named_parameters())
    total, first = 0.0, 0
    with own_precision(model):
        for logits_of, targets in _rollouts(model, batch):
            logp, entropy = _log_prob_and_entropy(logits_of(named), targets)
            mine = slice(first, first + len(targets))
            a, b = (torch.as_tensor(weight[mine]).to(logp) for weight in (entropy_weight, logp_weight))
            total = total + (a * entropy + b * logp).sum()
            first += len(targets)
        found = torch.autograd.grad(total, list(named.values()))
    return {name: g.cpu().double() for name, g in zip(named, found, strict=True)}


def _rollouts(model, batch: PackedBatch) -> Iterator[tuple]:
    """(weights -> logits [n, V] of the response's tokens at the sampling temperature, targets [n]), where n > 0."""
    model.set_attn_implementation("eager")
    for i in range(len(batch)):
        prompt, response = batch.prompt(i), batch.response(i)
        if len(response) == 0:
            continue
        ids = torch.tensor([[*prompt, *response]], device=model.device)

        def logits_of(weights, ids=ids, first=len(prompt) - 1):  # noqa: B008
            logits = functional_call(model, weights, (), dict(input_ids=ids, use_cache=False)).logits[0, first:-1]
            return logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE

        yield logits_of, ids[0, -len(response) :]


def _log_prob_and_entropy(logits, targets) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
