"""Tables of the enumerable policy whose rollouts another sampler drew."""

import dataclasses
from functools import cache

import numpy as np
import torch
from oracles import TinyPolicy, jet_exp
from tables import POLICY, columns, token_jets

from dentropy.stats.tables import SequenceSums, TokenStats


class Hotter(TinyPolicy):
    """POLICY at another temperature."""

    def logits(self, eta):
        return super().logits(eta) / 1.25


class Older(TinyPolicy):
    """POLICY before steps that went elsewhere than along its direction."""

    def logits(self, eta):
        step = 0.35 * np.random.default_rng(5).standard_normal(self.A.shape)
        return super().logits(eta) - np.stack([step, 0 * step, 0 * step])


class TopP(TinyPolicy):
    """POLICY without its least likely tokens, the last fifth of the mass of each distribution."""

    def logits(self, eta):
        z = super().logits(eta)
        p = np.exp(z[0] - z[0].max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        order = np.argsort(-p, -1)
        ordered = np.take_along_axis(p, order, -1)
        drop = np.zeros_like(p, dtype=bool)
        np.put_along_axis(drop, order, np.cumsum(ordered, -1) - ordered > 0.8, -1)
        return np.where(drop, np.array([-60.0, 0.0, 0.0])[:, None, None, None], z)


class Uniform:
    """Every answer is as likely as every other: with each once per prompt, sums over rollouts are expectations."""

    def token_jets(self, eta):
        sequences = POLICY.sequences
        having = {}
        for s in sequences:
            for k in range(len(s) + 1):
                having[s[:k]] = having.get(s[:k], 0) + 1
        logq = np.zeros((1, len(sequences), POLICY.horizon))
        for i, s in enumerate(sequences):
            logq[0, i, : len(s)] = [np.log(having[s[: k + 1]] / having[s[:k]]) for k in range(len(s))]
        return np.broadcast_to(logq, (1, POLICY.n_prompts, *logq.shape[1:])), None


SAMPLERS = {"hotter": Hotter(), "older": Older(), "top-p": TopP(), "uniform": Uniform()}


@cache
def sampler_logp(name: str) -> np.ndarray:
    """log q of every token, [prompts, sequences, horizon], 0 past the end of a sequence."""
    return SAMPLERS[name].token_jets(0.0)[0][0] * POLICY.mask


def table_of(name: str, prompt, sequence, eta=0.0, per_group=8) -> SequenceSums:
    """The table of rollouts that the sampler of that name drew, at θ + η·v, with tokens up to second order."""
    logp, entropy = token_jets(eta)
    keep = POLICY.mask[sequence]
    kept = [torch.from_numpy(jet[o, prompt, sequence][keep]) for o in range(3) for jet in (logp, entropy)]
    fisher = torch.from_numpy(_fisher(eta)[prompt, sequence][keep])
    logq = sampler_logp(name)[prompt, sequence]
    return dataclasses.replace(
        POLICY.table(prompt, sequence, columns(eta), per_group=per_group),
        tokens=TokenStats(*kept, fisher),
        sampler_logp=logq.sum(-1),
        sampler_tokens=logq[keep],
    )


@cache
def _fisher(eta: float) -> np.ndarray:
    return POLICY.fisher(eta)


def every_answer(eta=0.0) -> SequenceSums:
    """Every answer to every prompt once."""
    count = len(POLICY.sequences)
    prompt, sequence = np.repeat(np.arange(POLICY.n_prompts), count), np.tile(np.arange(count), POLICY.n_prompts)
    return table_of("uniform", prompt, sequence, eta, count)


def drawn_by(name: str, n_batches: int, n_groups: int, *, etas=(0.0,), per_group=8, seed=0):
    """Tables at each of `etas`, batch by batch."""
    rng = np.random.default_rng(seed)
    for rollouts in zip(*SAMPLERS[name].sample(rng, n_batches, n_groups=n_groups, per_group=per_group), strict=True):
        yield rollouts, tuple(table_of(name, *rollouts, eta, per_group) for eta in etas)


def mean_over_answers(values: np.ndarray, eta=0.0) -> np.ndarray:
    """(E, E', E'') at η of `values` [prompts, sequences]."""
    return (jet_exp(token_jets(eta)[0].sum(-1)) * values).sum(-1).mean(-1)
