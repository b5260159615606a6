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
from dentropy.model.shards import dot
from dentropy.passes.forward_mode import moved_weights
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import SequenceSums

BLOCKS = 8  # other roundings
T_QUANTILE = 2.306  # Student's t, 95%, for a standard deviation that is known from BLOCKS of them
SHARE = 0.16  # of the rollouts that are scored again, so that five η cost less than one plain pass
LEAST = 2  # rollouts of a block: one alone says nothing of what rollouts share
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
    w_i T_i is Σ_j w_{<j}). With a and c the means over the sample of d_i² and of
    d_i d_j, i ≠ j within a block, the floor is 2.306 σ (Student's t, σ being known from eight roundings),

        σ² = S a + S (S − 1) max(0, c + s) + [(1 − φ) η R']² ,      φ = ⟨fl(θ + ηv) − θ, ηv⟩ / ‖ηv‖² .

    c is what the rollouts share, which no number of them averages out. Blocks of m rollouts know it to within the
    standard error s = a (1 − m/S) / sqrt(4 m (m − 1)), that of c where they share nothing, and S² multiplies it: a
    sample cannot rule out that much. So the floor is up to 7 times larger than of all rollouts. φ is
    the share of the update that is left in weights of this precision and R' the slope, so that an update that is
    rounded away is seen as such.

    The rollouts are drawn at random from the S of this batch with a response: the sample stands for them, whatever
    the prompts have in common, while few heavy weights w_i may hide in the rest. Fewer than 75 rollouts cost more than
    their share: a block has two of them at least. Every block goes over all weights once, of which it holds a copy.

    Args:
        policy, batch, direction: as measured.
        base: the table at η = 0, for prefix weights with its tokens.
        measured: `importance` of the table at `eta`.
        first: the slope of `base` that is the measurement's derivative: "exact", with prefix weights "causal".
        eta: where ΔH was measured.
        token_budget, progress: as in `measure`; progress sees the tokens of the sample.

    Returns:
        2.306 σ. The same for the same input: random numbers come from a generator of a fixed seed.

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
    settings = dict(token_budget=token_budget, progress=progress)
    return noise_floors(policy, batch, direction, base, [measured], [first], eta, **settings)[0]


def noise_floors(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    base: SequenceSums,
    measured: Sequence[ImportanceResult],
    first: Sequence[Estimate],
    eta: float,
    *,
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """`noise_floor` of each of several measurements of one η, with the slope of each, by the same other roundings."""
    for measurement, slope in zip(measured, first, strict=True):
        check_estimate("first", slope, "slope", DERIVATIVE[measurement.weights])
    generator = torch.Generator(policy.device).manual_seed(SEED)
    lost, others = _lost(policy.moving(direction), eta), []
    with moved_weights(policy, direction, eta):
        for rollouts in sampled_rollouts(batch):
            with policy.in_place(_rounded_otherwise(policy, generator)):
                settings = dict(keep_tokens=True, token_budget=token_budget, progress=progress)
                table = measure(policy, batch.take(rollouts), **settings)
            others.append((rollouts, table))
    n, floors = np.count_nonzero(batch.response_lens), []
    for measurement, slope in zip(measured, first, strict=True):
        variance = _variance(_differences(base, measurement, others), n)
        floors.append(T_QUANTILE * float(np.sqrt(variance + (lost * slope.value) ** 2)))
    return floors


def sampled_rollouts(batch: PackedBatch) -> np.ndarray:
    """The rollouts whose rounding is looked at, int64 [BLOCKS, size]: in random order, none twice in a block.

    SHARE of those with a response; but LEAST to a block where they are so few, so that some are in several blocks.
    """
    rollouts = np.random.default_rng(SEED).permutation(np.flatnonzero(batch.response_lens))
    size = min(len(rollouts), max(LEAST, round(SHARE * len(rollouts) / BLOCKS)))
    return np.resize(rollouts, (BLOCKS, size))


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
        return float(n * square)
    pairs = size * (size - 1)
    product = np.mean(differences.sum(1) ** 2 - np.sum(differences**2, 1)) / pairs
    unseen = square * (1 - size / n) * np.sqrt(2 / (blocks * pairs))
    return float(n * square + n * (n - 1) * max(0.0, product + unseen))


@torch.no_grad()
def _lost(moving: list[tuple[Tensor, Tensor]], eta: float) -> float:
    """(1 − φ) η: by how much the weights are short of η along v, having been rounded to their dtype."""
    along, square = 0.0, 0.0
    for start, v in moving:
        moved = torch.add(start, v, alpha=eta)
        along += dot(moved.double() - start.double(), v)
        square += dot(v, v)
    return eta - along / square


def _rounded_otherwise(policy: Policy, generator: torch.Generator) -> dict[int, Callable[[Tensor], Tensor]]:
    """For the id() of every parameter as it stands what makes of its values those with probability 1/12 each one number
    up or down. Sharded ones are made anew whenever they are gathered, by the same random numbers."""
    if not policy.is_sharded:
        return {id(p): partial(_one_in_six_a_unit_off, generator=generator) for p in policy.model.parameters()}
    makes = {}
    for p in policy.model.parameters():
        makes[id(p)] = partial(_again, state=generator.get_state())
        torch.empty(p.shape, dtype=p.dtype, device=p.device).uniform_(generator=generator)
    return makes


def _again(values: Tensor, state: Tensor) -> Tensor:
    generator = torch.Generator(values.device)
    generator.set_state(state)
    return _one_in_six_a_unit_off(values, generator)


def _one_in_six_a_unit_off(values: Tensor, generator: torch.Generator) -> Tensor:
    units = torch.empty_like(values).uniform_(-0.6, 0.6, generator=generator).round_()
    # ε/2 of a value is between a half and one unit of its last place: a little more always reaches the next number,
    # and no other.
    return torch.addcmul(values, values, units, value=0.51 * torch.finfo(values.dtype).eps)
