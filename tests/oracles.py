"""Exact enumeration of a tiny policy: the truth that the estimators and the pass are held against.

Everything here is plain NumPy float64 and shares no formula with the package: derivatives come from
arithmetic on truncated Taylor series ("jets"), expectations from a sum over every sequence of the policy.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from dentropy.stats.tables import SequenceSums, TokenStats

END = 0  # the end token; a sequence that reaches the horizon is cut off without it


# A jet is an array whose first axis holds (f, f', f'') at one value of eta.
def jet_mul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.stack([a[0] * b[0], a[1] * b[0] + a[0] * b[1], a[2] * b[0] + 2 * a[1] * b[1] + a[0] * b[2]])


def jet_exp(a: np.ndarray) -> np.ndarray:
    return np.exp(a[0]) * np.stack([np.ones_like(a[0]), a[1], a[2] + a[1] ** 2])


def jet_log(a: np.ndarray) -> np.ndarray:
    return np.stack([np.log(a[0]), a[1] / a[0], a[2] / a[0] - (a[1] / a[0]) ** 2])


def jet_div(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    first = (a[1] - a[0] / b[0] * b[1]) / b[0]
    return np.stack([a[0] / b[0], first, (a[2] - 2 * first * b[1] - a[0] / b[0] * b[2]) / b[0]])


class TinyPolicy:
    """A policy with logits of its own for every (prompt, prefix): z(eta) = scale * (A + eta B + eta² C / 2).

    A, B, C are standard normal [n_prompts, prefixes, vocab]. B also raises the end token's logit by
    `end_drift`, so that moving along eta shortens the answers and the length correction matters. `shift` gives,
    for a prefix, what is added to its logits [vocab] for every prompt. Prompts are equally likely.
    """

    def __init__(self, *, vocab=4, horizon=5, n_prompts=16, scale=1.0, end_drift=1.0, seed=0, shift=None):
        self.vocab, self.horizon, self.n_prompts, self.scale = vocab, horizon, n_prompts, scale
        inner = range(1, vocab)
        prefixes = [p for k in range(horizon) for p in itertools.product(inner, repeat=k)]
        index = {prefix: i for i, prefix in enumerate(prefixes)}
        ended = [prefix + (END,) for prefix in prefixes]
        self.sequences = ended + list(itertools.product(inner, repeat=horizon))
        self.lengths = np.array([len(s) for s in self.sequences])
        self.tokens = np.array([s + (0,) * (horizon - len(s)) for s in self.sequences])
        self.prefix = np.array([[index[s[:k]] if k < len(s) else 0 for k in range(horizon)] for s in self.sequences])
        self.mask = np.arange(horizon) < self.lengths[:, None]
        shape = (3, n_prompts, len(prefixes), vocab)
        self.A, self.B, self.C = np.random.default_rng(seed).standard_normal(shape)
        self.B[..., END] += end_drift
        if shift is not None:
            self.A += np.array([shift(prefix) for prefix in prefixes]) / scale
        self._cdf = np.cumsum(np.exp(self.columns(0.0)["logp"]), axis=1)

    def logits(self, eta: float) -> np.ndarray:
        """(z, z', z'') at eta, [3, prompts, prefixes, vocab]."""
        A, B, C = self.A, self.B, self.C
        return self.scale * np.stack([A + eta * B + eta**2 / 2 * C, B + eta * C, C])

    def token_jets(self, eta: float) -> tuple[np.ndarray, np.ndarray]:
        """Jets of logp_k and h_k, [3, prompts, sequences, horizon], 0 past the end of a sequence."""
        z = self.logits(eta)
        logp = z - jet_log(jet_exp(z).sum(-1, keepdims=True))
        entropy = -jet_mul(jet_exp(logp), logp).sum(-1)
        return logp[:, :, self.prefix, self.tokens] * self.mask, entropy[:, :, self.prefix] * self.mask

    def fisher(self, eta: float = 0.0) -> np.ndarray:
        """E (d log p_k / dη)² over the vocabulary, [prompts, sequences, horizon], 0 past the end of a sequence."""
        z = self.logits(eta)
        logp = z - jet_log(jet_exp(z).sum(-1, keepdims=True))
        return (np.exp(logp[0]) * logp[1] ** 2).sum(-1)[:, self.prefix] * self.mask

    def columns(self, eta: float = 0.0) -> dict[str, np.ndarray]:
        """Every column of the table for every prompt and sequence, each [prompts, sequences]."""
        logp, entropy = self.token_jets(eta)
        later = [sum(entropy[0, ..., j] for j in range(k + 1, self.horizon)) for k in range(self.horizon)]
        left = [np.maximum(self.lengths - k, 0) for k in range(1, self.horizon + 1)]
        before = np.concatenate([np.zeros_like(logp[..., :1]), np.cumsum(logp, -1)[..., :-1]], -1)
        before[0] = 0.0  # log-weights against the policy at this eta
        weight = jet_exp(before) * self.mask
        return {
            "n_tokens": np.broadcast_to(self.lengths, logp.shape[1:3]).astype(float),
            "logp": logp[0].sum(-1),
            "entropy": entropy[0].sum(-1),
            "dlogp": logp[1].sum(-1),
            "dentropy": entropy[1].sum(-1),
            "entropy_dlogp": (entropy[0] * logp[1]).sum(-1),
            "entropy_to_go": sum(logp[1, ..., k] * later[k] for k in range(self.horizon)),
            "length_to_go": sum(logp[1, ..., k] * left[k] for k in range(self.horizon)),
            "fisher": self.fisher(eta).sum(-1),
            "d2logp": logp[2].sum(-1),
            "d2entropy": entropy[2].sum(-1),
            "dentropy_to_go": (weight[1] * entropy[1]).sum(-1),
            "entropy_to_go_2": (weight[2] * entropy[0]).sum(-1),
            "length_to_go_2": weight[2].sum(-1),
        }

    def truth(self, eta: float = 0.0, per: str = "token") -> np.ndarray:
        """(R, R', R'') at eta of the true entropy per token or sequence, summed over all that can happen."""
        logp, entropy = self.token_jets(eta)
        probability = jet_exp(logp.sum(-1))
        size = self.lengths if per == "token" else np.ones_like(self.lengths)
        return jet_div(jet_mul(probability, entropy.sum(-1)).sum((1, 2)), (probability * size).sum((1, 2)))

    def sample(self, rng, n_batches, *, n_groups=16, per_group=4, prompts="random"):
        """Prompt and sequence indices of rollouts, each [n_batches, n_groups * per_group], groups in a row.

        prompts="fixed" gives every batch the prompts 0, 1, ... in turn: all, with n_groups = n_prompts.
        """
        shape = (n_batches, n_groups)
        drawn = rng.integers(self.n_prompts, size=shape)
        if prompts == "fixed":
            drawn = np.broadcast_to(np.arange(n_groups) % self.n_prompts, shape)
        prompt = np.repeat(drawn, per_group, axis=1)
        # One search over all prompts at once: prompt p's cumulative probabilities are shifted to [p, p + 1].
        flat = (self._cdf / self._cdf[:, -1:] + np.arange(self.n_prompts)[:, None]).ravel()
        sequence = np.searchsorted(flat, prompt + rng.random(prompt.shape), side="right")
        return prompt, sequence - prompt * len(self.sequences)

    def table(self, prompt, sequence, columns, *, per_group=4) -> SequenceSums:
        """The table of one batch: the given columns, all of `columns(eta)` or some, at its rollouts."""
        rollout = np.arange(len(prompt))
        picked = {name: column[prompt, sequence] for name, column in columns.items()}
        return SequenceSums(**picked, group=rollout // per_group, rollout=rollout)

    def packed(self, prompt, sequence, eta: float = 0.0) -> dict[str, np.ndarray]:
        """What a model gives for rollouts: logits, dlogits, d2logits [N, vocab], targets, cu_seqlens."""
        z = self.logits(eta)
        keep = self.mask[sequence]
        rows = z[:, np.asarray(prompt)[:, None], self.prefix[sequence]][:, keep]
        cu_seqlens = np.concatenate([[0], np.cumsum(self.lengths[sequence])])
        return {
            "logits": rows[0],
            "dlogits": rows[1],
            "d2logits": rows[2],
            "targets": self.tokens[sequence][keep],
            "cu_seqlens": cu_seqlens,
        }


def take(sums: SequenceSums, rows) -> SequenceSums:
    """The table of these rows, with their tokens where it has kept them."""
    tokens = sums.tokens
    if tokens is not None:
        ends = np.concatenate([[0], np.cumsum(sums.n_tokens).astype(int)])
        index = np.concatenate([np.arange(ends[row], ends[row + 1]) for row in rows])
        tokens = TokenStats(*(None if values is None else values[index] for values in tokens))
    return SequenceSums(**{name: values[rows] for name, values in sums.columns().items()}, tokens=tokens)


def repeat_rows(sums: SequenceSums, counts) -> SequenceSums:
    """The table with row i occurring counts[i] times, which weights the rollouts; they are numbered anew."""
    picked = take(sums, np.repeat(np.arange(len(sums)), counts))
    return dataclasses.replace(picked, rollout=np.arange(len(picked)))


def influence_by_repetition(value, n_rows: int, copies: int = 1000) -> np.ndarray:
    """d value / d weight of each row, by central differences: value(counts) with one row at copies ± 1.

    `value` maps integer counts [n_rows] to a number that depends on their ratios alone; the error is of
    relative order 1 / copies².
    """

    def moved(row, by):
        counts = np.full(n_rows, copies)
        counts[row] += by
        return value(counts)

    return np.array([(moved(row, 1) - moved(row, -1)) * copies / 2 for row in range(n_rows)])
