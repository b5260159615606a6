"""The arithmetic's own error of a measured ΔH: below it a measurement says nothing, however small its error bar.

ΔH(η) is the difference of two sums of rounded numbers, at weights that are themselves rounded to θ + η·v. Sampling
error bars do not see that: both sides use the same rollouts. What it amounts to shows when the same rollouts are scored
at the same η under other roundings: of the weights, and through them of everything computed from these. Nothing else
changes, so the curvature of ΔH, however large, does not enter.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dentropy.estimators import Estimate, ImportanceResult, importance
from dentropy.estimators.estimate import check_estimate
from dentropy.model.direction import Direction
from dentropy.model.policy import Policy
from dentropy.model.shards import beside, dot, laid_out_as, own_part
from dentropy.passes.forward_mode import moved_weights
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import SequenceSums

BLOCKS = 8  # other roundings, fewer where the rollouts are
SHARE = 0.16  # of the rollouts that are scored again, once for all η
LEAST = 2  # rollouts of a block: one alone says nothing of what rollouts share
# Student's t at 95%, for a standard deviation that is known from one rounding, two, and so on to BLOCKS.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
SEED = 0
# By the weights of a measurement, the slope that is its derivative.
DERIVATIVE = {"prefix": "causal", "sequence": "exact"}


def noise_floor(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    base: SequenceSums,
    measured: ImportanceResult,
    first: Estimate,
    eta: float,
    *,
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> float:
    """What the rounding in the ΔH measured at `eta` stays below in 95% of cases, in nats per token.

    A sample of the rollouts, `sampled_rollouts`, is scored again in blocks, each with a rounding of its own: every
    weight of the moved policy goes to the next number up or down with probability 1/12 each, twice the variance of
    rounding to nearest. To first order ΔH changes by Σ_i d_i with

        d_i = [w*_i (H*_i − R T_i) − w_i (H_i − R T_i)] / Σ_j w_j T_j ,

    R, w and H of the measurement, a star for the other rounding (with prefix weights w_i H_i is Σ_j w_{<j} h_j, and
    w_i T_i is Σ_j w_{<j}). With a and c the means over the sample of d_i² and of d_i d_j, i ≠ j within a block, the
    floor is t σ for the roundings, t being Student's (2.306 for eight, σ being known from so many), and 2.306 times the
    rest, which is known:

        floor² = t² σ² + 2.306² [(1 − φ) η R']² ,      σ² = S a + S (S − 1) max(0, c + s) ,
        φ = ⟨fl(θ + ηv) − θ, ηv⟩ / ‖ηv‖² .

    c is what the rollouts share, which no number of them averages out. B blocks of m rollouts know it to within the
    standard error s = a (1 − m/S) sqrt(2 / (B m (m − 1))), that of c where they share nothing, and S² multiplies it: a
    sample cannot rule out that much. So the floor is up to 7 times larger than of all rollouts. φ is
    the share of the update that is left in weights of this precision and R' the slope, so that an update that is
    rounded away is seen as such.

    The rollouts are drawn at random from the S of this batch with a response: the sample stands for them, whatever the
    prompts have in common, while few heavy weights w_i may hide in the rest. Fewer than 100 rollouts cost more than
    their share: a block has two of them at least, and there are eight from 17 rollouts on. Every block goes over all
    weights once, of which it holds a copy.

    Args:
        policy, batch, direction: as measured.
        base: the table at η = 0, for prefix weights with its tokens.
        measured: `importance` of the table at `eta`.
        first: the slope of `base` that is the measurement's derivative: "exact", with prefix weights "causal".
        eta: where ΔH was measured.
        token_budget, progress: as in `measure`; progress sees the tokens of the sample.

    Returns:
        The floor. The same for the same input: random numbers come from a generator of a fixed seed.

    Raises:
        ValueError: another slope; and as `measure`.

    Example:
        >>> from dentropy import importance, slope
        >>> from dentropy.demo.run import load_policy, draw_rollouts
        >>> from dentropy.passes.policy_gradient import policy_gradient_direction
        >>> policy, tokenizer = load_policy()
        >>> rollouts = draw_rollouts(policy, tokenizer, n_prompts=4, per_prompt=4, seed=0)
        >>> direction = policy_gradient_direction(policy, rollouts, step_size=1e-4)
        >>> base = measure(policy, rollouts, direction)
        >>> measured = importance(base, measure(policy, rollouts, direction, eta=1e-4))
        >>> exact = slope(base, estimator="exact")
        >>> floor = noise_floor(policy, rollouts, direction, base, measured, exact, 1e-4)
        >>> 0 < floor < 0.01 * abs(measured.delta)
        True
    """
    check_estimate("first", first, "slope", DERIVATIVE[measured.weights])
    others = _scored_otherwise(policy, batch, direction, eta, token_budget=token_budget, progress=progress)
    lost = _lost(policy.moving(direction), eta)
    return _floor(base, measured, first, others, lost, np.count_nonzero(batch.response_lens))


def noise_floors(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    base: SequenceSums,
    moved: dict[float, SequenceSums],
    measured: dict[float, Sequence[ImportanceResult]],
    first: Sequence[Estimate],
    *,
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> dict[float, list[float]]:
    """`noise_floor` of several measurements at every η, with the slope of each, from other roundings at one of them.

    What these make of the log-probability and the entropy of a token at the smallest |η| is added to those at every
    other: to first order it is the derivative along the same change of the weights, which differs by as much as the
    policies do. Weights of rollouts, their means and what rounding took of the update are those of each η.

    Args:
        moved: the table at each η, as `measure` gives it, with its tokens.
        measured: of each η, measurements of that table.
    """
    at = min(moved, key=abs)
    for measurement, slope in zip(measured[at], first, strict=True):
        check_estimate("first", slope, "slope", DERIVATIVE[measurement.weights])
    others = _scored_otherwise(policy, batch, direction, at, token_budget=token_budget, progress=progress)
    n, floors = np.count_nonzero(batch.response_lens), {}
    for eta, table in moved.items():
        there = others if eta == at else [(rows, _carried(other, moved[at], table, rows)) for rows, other in others]
        lost = _lost(policy.moving(direction), eta)
        floors[eta] = [_floor(base, m, s, there, lost, n) for m, s in zip(measured[eta], first, strict=True)]
    return floors


Scored = list[tuple[np.ndarray, SequenceSums]]  # the rollouts of each block, and their table under its rounding


def _scored_otherwise(policy: Policy, batch: PackedBatch, direction: Direction, eta: float, **settings) -> Scored:
    """The sampled rollouts at `eta`, each block under another rounding of every weight."""
    generator, scored = torch.Generator(policy.device).manual_seed(SEED), []
    with moved_weights(policy, direction, eta):
        for rollouts in sampled_rollouts(batch):
            with policy.in_place(_rounded_otherwise(policy, generator)):
                scored.append((rollouts, measure(policy, batch.take(rollouts), keep_tokens=True, **settings)))
    return scored


def _carried(other: SequenceSums, start: SequenceSums, end: SequenceSums, rollouts: np.ndarray) -> SequenceSums:
    """The table of `rollouts` under another rounding, with what they change from one table of all to another."""
    start, end = (table.take(np.argsort(table.rollout)[rollouts]) for table in (start, end))
    tokens = {
        name: getattr(other.tokens, name).double() + (getattr(end.tokens, name).double() - getattr(start.tokens, name))
        for name in ("logp", "entropy")
    }
    sums = {name: getattr(other, name) + (getattr(end, name) - getattr(start, name)) for name in tokens}
    return replace(other, **sums, tokens=other.tokens._replace(**tokens))


def _floor(
    base: SequenceSums, measured: ImportanceResult, first: Estimate, others: Scored, lost: float, n: int
) -> float:
    """The floor of one measurement of `n` rollouts with a response."""
    deviation = np.sqrt(_variance(_differences(base, measured, others), n))
    return float(np.hypot(T_QUANTILES[len(others) - 1] * deviation, T_QUANTILES[-1] * lost * first.value))


def sampled_rollouts(batch: PackedBatch) -> np.ndarray:
    """The rollouts whose rounding is looked at, int64 [blocks, size]: in random order, none twice and never all.

    SHARE of those with a response in BLOCKS blocks; but LEAST to a block where they are so few, and of fewer than 17 as
    many such blocks as leave one rollout out. (Of two rollouts it is one, and of one that one.)
    """
    rollouts = np.random.default_rng(SEED).permutation(np.flatnonzero(batch.response_lens))
    most = max(1, len(rollouts) - 1)
    size = min(most, max(LEAST, round(SHARE * len(rollouts) / BLOCKS)))
    blocks = min(BLOCKS, most // size)
    return rollouts[: blocks * size].reshape(blocks, size)


def _differences(
    base: SequenceSums, measured: ImportanceResult, others: list[tuple[np.ndarray, SequenceSums]]
) -> np.ndarray:
    """d_i of `noise_floor`, one row per block: float64 [blocks, rollouts of a block]."""
    largest, row_of = measured.log_weights.max(), np.argsort(base.rollout)

    def centred(result: ImportanceResult) -> np.ndarray:
        terms = result.moved_entropy - measured.moved_value * result.size
        return np.exp(result.log_weights - largest) * terms

    here, differences = centred(measured), []
    for rollouts, other in others:
        rows = row_of[rollouts]
        again = importance(replace(base.take(rows), rollout=other.rollout), other, weights=measured.weights)
        differences.append(centred(again) - here[rows])
    return np.array(differences) / np.sum(np.exp(measured.log_weights - largest) * measured.size)


def _variance(differences: np.ndarray, n: int) -> float:
    """S a + S (S − 1) max(0, c + s) of `noise_floor`, S = `n`, from d [blocks, rollouts of a block]."""
    blocks, size = differences.shape
    square = np.mean(differences**2)
    if size == 1:
        return float(n**2 * square)  # as if the rollouts shared all of it
    pairs = size * (size - 1)
    product = np.mean(differences.sum(1) ** 2 - np.sum(differences**2, 1)) / pairs
    unseen = square * (1 - size / n) * np.sqrt(2 / (blocks * pairs))
    return float(n * square + n * (n - 1) * max(0.0, product + unseen))


@torch.no_grad()
def _lost(moving: list[tuple[Tensor, Tensor]], eta: float) -> float:
    """(1 − φ) η: by how much the weights are short of η along v, having been rounded to their dtype."""
    along, square = 0.0, 0.0
    for start, v in moving:
        v = beside(v, start).to(start.dtype)
        moved = torch.add(start, v, alpha=eta)
        along += dot(moved.double() - start.double(), v)
        square += dot(v, v)
    return eta - along / square


def _rounded_otherwise(policy: Policy, generator: torch.Generator) -> dict[int, Callable[[Tensor], Tensor]]:
    """For the id() of every parameter as it stands what makes of its values those with probability 1/12 each one number
    up or down; of sharded ones, made anew whenever they are gathered or only in part, by the same random numbers."""
    if not policy.is_sharded:
        return {id(p): partial(_one_in_six_a_unit_off, generator=generator) for p in policy.model.parameters()}
    makes = {}
    for p in policy.model.parameters():
        makes[id(p)] = partial(_again, state=generator.get_state(), parameter=p)
        torch.empty(p.shape, dtype=p.dtype, device=p.device).uniform_(generator=generator)
    return makes


def _again(values: Tensor, state: Tensor, parameter: Tensor) -> Tensor:
    generator = torch.Generator(values.device)
    generator.set_state(state)
    if values.shape == parameter.shape:
        return _one_in_six_a_unit_off(values, generator)
    units = _units(torch.empty(parameter.shape, dtype=values.dtype, device=values.device), generator)
    return _moved_by(values, own_part(laid_out_as(units, parameter)))


def _one_in_six_a_unit_off(values: Tensor, generator: torch.Generator) -> Tensor:
    return _moved_by(values, _units(torch.empty_like(values), generator))


def _units(out: Tensor, generator: torch.Generator) -> Tensor:
    """-1, 0 or 1 everywhere."""
    return out.uniform_(-0.6, 0.6, generator=generator).round_()


def _moved_by(values: Tensor, units: Tensor) -> Tensor:
    # ε/2 of a value is between a half and one unit of its last place: a little more always reaches the next number,
    # and no other.
    return torch.addcmul(values, values, units, value=0.51 * torch.finfo(values.dtype).eps)
