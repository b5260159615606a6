"""Tables of the enumerable policy whose rollouts another sampler drew."""

import dataclasses
from functools import cache

import numpy as np
import torch
from oracles import TinyPolicy, jet_exp
from scipy.special import stdtrit
from tables import ESTIMATORS, POLICY, columns, token_jets

from dentropy.estimators import curvature, forecast, importance, predict, prediction_error, slope
from dentropy.estimators.columns import entropy_ratio
from dentropy.estimators.groups import Groups
from dentropy.estimators.reweighting import FORM
from dentropy.stats.tables import SequenceSums, TokenStats

ETA = 0.1
FORMS = {"causal": "prefix", "exact": "sequence"}
RIGHT = np.random.default_rng(1).random((POLICY.n_prompts, len(POLICY.sequences))) < 0.3  # which answers are


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


def statistics(base, moved, right):
    """Every estimate from the tables at 0 and at ETA, and the truth it is of, by name."""
    truths = {per: (POLICY.truth(0.0, per), POLICY.truth(ETA, per)[0]) for per in ("token", "sequence")}
    for per, ((before, first, second), after) in truths.items():
        yield f"entropy {per}", Entropy(base, per), before
        for estimator in ESTIMATORS:
            yield f"slope {estimator} {per}", slope(base, estimator=estimator, per=per), first
        for estimator, weights in FORMS.items():
            measured = importance(base, moved, weights=weights, per=per)
            bend = curvature(base, estimator=estimator, per=per)
            error = prediction_error(predict(slope(base, estimator=estimator, per=per), ETA, bend), measured)
            yield f"importance {weights} {per}", measured, after - before
            yield f"curvature {estimator} {per}", bend, second
            yield f"error {weights} {per}", error, ETA * first + ETA**2 / 2 * second - (after - before)
    found = forecast(base, {ETA: moved}, right)
    lengths = np.broadcast_to(POLICY.lengths, RIGHT.shape).astype(float)
    for name, change, values in (("reward", found.reward, RIGHT.astype(float)), ("length", found.length, lengths)):
        now, first, _ = mean_over_answers(values)
        yield f"{name} slope", change.slope, first
        yield f"{name} change", change.changes[ETA], mean_over_answers(values, ETA)[0] - now
    divergence, fisher = divergences(ETA)
    yield "kl", found.kl.measured[ETA], divergence
    yield "fisher", found.kl.fisher, fisher


@cache
def divergences(eta: float) -> tuple[float, float]:
    """KL(π_0‖π_η) and the Fisher information along the direction, both per rollout."""
    now, then = POLICY.columns(), POLICY.columns(eta)
    probability = np.exp(now["logp"])
    return tuple((probability * x).sum(1).mean() for x in (now["logp"] - then["logp"], now["fisher"]))


class Entropy:
    """H̄ with the interval that its standard error makes."""

    def __init__(self, sums: SequenceSums, per: str):
        ratio = entropy_ratio(sums, per, FORM["causal"])
        groups = Groups.of(sums.group, "random")
        self.value, self.stderr = float(ratio.mean), groups.stderr(ratio.centred / ratio.total)[0]
        self.reach = stdtrit(groups.dof, 0.975) * self.stderr

    def interval(self) -> tuple[float, float]:
        return self.value - self.reach, self.value + self.reach
