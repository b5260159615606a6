"""What the forecast should find on the enumerable policy, summed over all answers."""

import dataclasses
from functools import cache, cached_property

import numpy as np
import torch
from oracles import jet_exp

from dentropy.stats.tables import SequenceSums, TokenStats


class Gains:
    """Truth for a policy; an answer is right (1) or wrong (0) by its tokens and its prompt."""

    def __init__(self, policy, often=3):
        self.policy = policy
        self.columns, self.token_jets = cache(policy.columns), cache(policy.token_jets)
        marks = np.array([sum((place + 1) * token for place, token in enumerate(s)) for s in policy.sequences])
        self.right = ((marks[None] + np.arange(policy.n_prompts)[:, None]) % often == 0).astype(float)
        self.score = np.random.default_rng(7).standard_normal(self.right.shape)

    def probability(self, eta):
        """Jets [3, prompts, sequences]."""
        return jet_exp(self.token_jets(eta)[0].sum(-1))

    def mean(self, values, eta=0.0):
        """(E, E', E'') at eta of `values` [prompts, sequences]."""
        return (self.probability(eta) * values).sum(-1).mean(-1)

    def pass_at(self, k, eta=0.0):
        """(pass@k, its derivative) at eta."""
        q, dq, _ = (self.probability(eta) * self.right).sum(-1)
        return np.mean(1 - (1 - q) ** k), np.mean(k * (1 - q) ** (k - 1) * dq)

    def divergence(self, eta):
        """KL(π_0‖π_η) per sequence."""
        before, after = (self.token_jets(at)[0][0].sum(-1) for at in (0.0, eta))
        return (np.exp(before) * (before - after)).sum(-1).mean()

    @cached_property
    def fisher(self):
        """Σ_k Var_p(ż_k) of every prompt and sequence, by the definition of a variance."""
        z, dz, _ = self.policy.logits(0.0)
        p = np.exp(z - np.log(np.exp(z).sum(-1, keepdims=True)))
        variance = (p * (dz - (p * dz).sum(-1, keepdims=True)) ** 2).sum(-1)
        return (variance[:, self.policy.prefix] * self.policy.mask).sum(-1)


def table(gains, prompt, sequence, eta=0.0, per_group=8) -> SequenceSums:
    """The table of these rollouts at eta, with tokens, and at 0 with derivatives and `fisher`."""
    policy = gains.policy
    logp, entropy = gains.token_jets(eta)
    keep = policy.mask[sequence]
    orders = (0, 1) if eta == 0 else (0,)
    kept = [torch.from_numpy(jet[order, prompt, sequence][keep]) for order in orders for jet in (logp, entropy)]
    sums = policy.table(prompt, sequence, gains.columns(eta), per_group=per_group)
    sums = dataclasses.replace(sums, tokens=TokenStats(*kept))
    return dataclasses.replace(sums, fisher=gains.fisher[prompt, sequence]) if eta == 0 else sums


def batches(gains, seed=0, n_groups=16, prompts="random", n_batches=1, etas=(), per_group=8):
    """(base, {eta: moved}, right, score), one batch after the other."""
    rng = np.random.default_rng(seed)
    drawn = gains.policy.sample(rng, n_batches, n_groups=n_groups, per_group=per_group, prompts=prompts)
    for rollouts in zip(*drawn, strict=True):
        moved = {eta: table(gains, *rollouts, eta, per_group) for eta in etas}
        yield table(gains, *rollouts, per_group=per_group), moved, gains.right[rollouts], gains.score[rollouts]
