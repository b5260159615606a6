"""A policy whose rollouts can be long: Markov chains (the state is the last token) with exact answers by recursion."""

import dataclasses

import numpy as np
import torch
from oracles import END, jet_div, jet_exp, jet_log, jet_mul

from dentropy.stats.sequence_sums import sequence_sums
from dentropy.stats.tables import SequenceSums, TokenStats


class ChainPolicy:
    """Logits z(eta) = A + eta B for every (prompt, last token), which the end token starts and ends.

    A has standard deviation `scale`, B is standard normal; what they share across prompts is as large as what differs
    in A, and three times that in B. The end token's logits have the mean `end` in A and `end_drift` in B. A rollout of
    `horizon` tokens is cut off. Prompts are equally likely.
    """

    def __init__(self, *, vocab=6, horizon=31, n_prompts=64, scale=1.0, end=-2.5, end_drift=0.0, seed=0):
        self.vocab, self.horizon, self.n_prompts = vocab, horizon, n_prompts
        rng = np.random.default_rng(seed)
        common, own = rng.standard_normal((2, 1, vocab, vocab)), rng.standard_normal((2, n_prompts, vocab, vocab))
        self.A = scale * (common[0] + own[0]) / 2**0.5
        self.B = common[1] + own[1] / 3
        self.A[..., END] = end + 0.3 * own[0][..., END]
        self.B[..., END] += end_drift
        self._cdf = np.exp(self.jets(0.0)[0][0]).cumsum(-1)

    def jets(self, eta: float) -> tuple[np.ndarray, np.ndarray]:
        """Jets of log p, [3, prompts, states, vocab], and of the entropy, [3, prompts, states]."""
        z = np.stack([self.A + eta * self.B, self.B, np.zeros_like(self.B)])
        logp = z - jet_log(jet_exp(z).sum(-1, keepdims=True))
        return logp, -jet_mul(jet_exp(logp), logp).sum(-1)

    def truth(self, eta: float = 0.0) -> np.ndarray:
        """(R, R', R'') at eta of the entropy per token."""
        logp, entropy = self.jets(eta)
        p = jet_exp(logp)
        alive = np.zeros_like(entropy)
        alive[0, :, END] = 1.0
        total_entropy, tokens = np.zeros((3, self.n_prompts)), np.zeros((3, self.n_prompts))
        for _ in range(self.horizon):
            total_entropy += jet_mul(alive, entropy).sum(-1)
            tokens += alive.sum(-1)
            alive = jet_mul(alive[..., None], p).sum(2)
            alive[..., END] = 0.0
        return jet_div(total_entropy.sum(-1), tokens.sum(-1))

    def sample(self, rng, n_rollouts: int, per_group: int) -> "Rollouts":
        """Rollouts in groups of `per_group` for prompts drawn at random."""
        prompt = np.repeat(rng.integers(self.n_prompts, size=n_rollouts // per_group), per_group)
        state, alive, tokens, states, lengths = np.zeros_like(prompt), np.ones(len(prompt), bool), [], [], 0
        for _ in range(self.horizon):
            y = (self._cdf[prompt, state] < rng.random((len(prompt), 1))).sum(-1).clip(max=self.vocab - 1)
            states, tokens, lengths = states + [state], tokens + [y], lengths + alive
            alive = alive & (y != END)
            state = y
        return Rollouts(self, prompt, np.stack(states, 1), np.stack(tokens, 1), lengths, per_group)


class Rollouts:
    """Rollouts of a chain, whose tables at any eta have kept their tokens."""

    def __init__(self, policy, prompt, states, tokens, lengths, per_group):
        self.policy, self.lengths, self.per_group = policy, lengths, per_group
        keep = np.arange(policy.horizon) < lengths[:, None]
        self.index = np.broadcast_to(prompt[:, None], keep.shape)[keep], states[keep], tokens[keep]

    def tables(self, eta: float, n_batches: int, order: int = 0) -> list[SequenceSums]:
        """The rollouts at eta in batches of equal size, one table for each."""
        logp, entropy = self.policy.jets(eta)
        of_token = logp[(slice(None), *self.index)], entropy[(slice(None), *self.index[:2])]
        return tables_of_jets(*of_token, self.lengths, self.per_group, n_batches, order)


def tables_of_jets(logp, entropy, lengths, per_group: int, n_batches: int, order: int = 0) -> list[SequenceSums]:
    """Tables that have kept their tokens, of jets [3, N] of rollouts one after the other, in batches of equal size."""
    stats = TokenStats(*(torch.from_numpy(jets[k]) for k in range(order + 1) for jets in (logp, entropy)))
    ends, size = np.concatenate([[0], np.cumsum(lengths)]), len(lengths) // n_batches
    batches = []
    for first in range(0, size * n_batches, size):
        start, stop = ends[first], ends[first + size]
        tokens = TokenStats(*(None if x is None else x[start:stop] for x in stats))
        sums = sequence_sums(tokens, ends[first : first + size + 1] - start, group=np.arange(size) // per_group)
        batches.append(dataclasses.replace(sums, tokens=tokens))
    return batches
