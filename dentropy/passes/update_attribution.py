"""Which of the update's own tokens a slope comes from: every token's share of ∇R·v, exact, and what is not theirs.

A step is v = −(γP ∘ κg + momentum + decay) with g = Σ_j (a_j ∇logp_j + e_j ∇h_j) over the update's tokens j. So with
u = γP ∘ ∇R, along which one forward-mode pass over the update's rollouts gives dlogp_j and dh_j,

    R'(0) = ∇R·v = −κ Σ_j (a_j dlogp_j + e_j dh_j) − ∇R·momentum − ∇R·decay .

Of an Adam P is that of the second moment after the step: accounting for the step that is taken, not what the step would
have been without a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from torch import Tensor, nn

from dentropy.estimators import slope
from dentropy.model.direction import Direction
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.model.shards import dot, largest, whole, without_row
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.parameter_attribution import moving_by_name
from dentropy.passes.policy_gradient import PolicyGradientStep
from dentropy.passes.slope_gradient import SlopeGradient, slope_gradient
from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.sampling import end_tokens
from dentropy.shown import count, lines
from dentropy.stats.segments import place_in_sequence
from dentropy.stats.tables import SequenceSums, TokenStats

PARTS = 4  # of the prompts, each with a gradient of its own in memory
NOISE_ROLLOUTS = 1024  # of the update's, whose shares' noise is looked at where there are more


@dataclass(frozen=True, eq=False)
class UpdateAttribution:
    """A slope, in terms that add up to it, in nats per token (or sequence) per unit of η.

    Attributes:
        total: the slope along the direction.
        kl, entropy_bonus: those terms of the loss, over all tokens; 0.0 where it has none.
        momentum: what earlier gradients add.
        weight_decay: what the decay of the weights adds.
        unexplained: `total` less all of these and the tokens' shares: for the step's own direction rounding, for
            another one what the named terms do not explain.
        cosine: of the step's direction and the one that `total` is along.
        noise_fraction: the part of Σ share² that is noise of the evaluation's rollouts, estimated on `noise_rollouts`:
            near 0 single shares can be relied on, about 1 or above they are all noise; None for rollouts of one prompt.
        estimator, per: of the slope.
        optimizer, clip_factor: of the step.
        batch: the update's rollouts.
        rollout, position, token: int64 [n_tokens]: index in it, place in the response from 1, token id.
        end: bool [n_tokens]: whether it is an end token of the policy.
        advantage: A_j, float64 [n_tokens].
        weight: a_j without the KL penalty: what the loss's gradient multiplies ∇logp_j with, before clipping.
        logp, entropy: of each token under the policy, in nats.
        share: of each token in `total`.
    """

    total: float
    kl: float
    entropy_bonus: float
    momentum: float
    weight_decay: float
    unexplained: float
    cosine: float
    noise_fraction: float | None
    estimator: str
    per: str
    optimizer: str
    clip_factor: float
    batch: PackedBatch
    rollout: np.ndarray
    position: np.ndarray
    token: np.ndarray
    end: np.ndarray
    advantage: np.ndarray
    weight: np.ndarray
    logp: np.ndarray
    entropy: np.ndarray
    share: np.ndarray

    def __repr__(self) -> str:
        terms = ("total", "tokens", "kl", "entropy_bonus", "momentum", "weight_decay", "unexplained")
        rows = [(name.replace("_", " "), f"{getattr(self, name): .3e}") for name in terms]
        noise = "?" if self.noise_fraction is None else f"{self.noise_fraction:.2f}"
        of = f"{self.estimator} slope, nats per {self.per} per unit of η, by {count(len(self.share), 'token')}"
        return lines(self, [("of", f"{of} of {self.optimizer}"), *rows, ("noise fraction", noise)])

    @property
    def tokens(self) -> float:
        """The sum of the shares."""
        return float(self.share.sum())

    @property
    def reliability(self) -> float | None:
        """1 − noise_fraction: the part of Σ share² that is not noise; not above 0 where all of it may be."""
        return None if self.noise_fraction is None else 1 - self.noise_fraction


@in_turn
def update_attribution(
    policy: Policy,
    batch: PackedBatch,
    update: PolicyGradientStep,
    sums: SequenceSums,
    *,
    direction: Direction | None = None,
    gradient: SlopeGradient | None = None,
    estimator: str = "causal",
    per: str = "token",
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> UpdateAttribution:
    """The share of every token of `update` in the slope on `batch`; with the other terms they are the slope.

    One reverse pass over the batch, one forward-mode pass over the update's rollouts and, for the noise, one over
    `noise_rollouts`.

    Args:
        policy, batch: those of the measurement.
        update: `policy_gradient_step(policy, rollouts, ...)`, of other rollouts than the batch's. Where the
            measurement is made at other weights than the step (after it, say), its policy is one at those before it.
        sums: `measure(policy, batch, direction, keep_tokens=True)` at eta = 0.
        direction: the one `sums` was measured along; None is the step's own, `update.direction()`.
        gradient: the reverse pass where it was made already: `slope_gradient(..., parts=PARTS)` at the parameters of
            step and direction, with these `estimator` and `per`.
        estimator, per: as in `slope`.
        token_budget, progress: as in `measure`.

    Raises:
        ValueError: as `measure` and `token_attribution` do; a step of a policy with other parameters.

    Example:
        >>> from dentropy import PackedBatch, measure, policy_gradient_step, sample, update_attribution
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = sample(policy, [tokenizer.encode(text) for text in ("17=", "4=")], per_prompt=4, max_new_tokens=9)
        >>> prompt, *answers = (tokenizer.encode(text) for text in ("2=", "1+1", "1+2"))
        >>> rewarded = PackedBatch.from_lists([prompt] * 2, answers, group=[0, 0], reward=[1, 0])
        >>> step = policy_gradient_step(policy, rewarded, step_size=1e-4, optimizer="sgd")
        >>> found = update_attribution(policy, batch, step, measure(policy, batch, step.direction(), keep_tokens=True))
        >>> len(found.share), bool(abs(found.unexplained) < 1e-3 * abs(found.share).sum())
        (6, True)
    """
    _check_same_parameters(policy, update)
    moving = moving_by_name(policy, update.direction() if direction is None else direction)
    settings = {"token_budget": token_budget, "progress": progress}
    if gradient is None:
        names = list(dict.fromkeys([*update.gradient, *moving]))
        gradient = slope_gradient(policy, batch, sums, names, estimator=estimator, per=per, parts=PARTS, **settings)
    dotted = _dotted(update, moving, gradient)
    along = _along(update.policy, update.batch, _steepest(dotted.gain, gradient.whole), **settings)
    shares = _terms(update, along)
    total = slope(sums, estimator=gradient.estimator, per=gradient.per).value
    other = {"momentum": dotted.momentum, "weight_decay": dotted.weight_decay}
    other |= {name: float(shares[name].sum()) for name in ("kl", "entropy_bonus")}
    noise = _noise_fraction(update, gradient, dotted.gain, shares["share"], **settings)
    return UpdateAttribution(
        total=total,
        **other,
        unexplained=total - float(shares["share"].sum()) - sum(other.values()),
        cosine=dotted.cosine,
        noise_fraction=noise,
        estimator=gradient.estimator,
        per=gradient.per,
        optimizer=update.optimizer,
        clip_factor=update.clip_factor,
        batch=update.batch,
        **_places(update.batch, end_tokens(policy)),
        advantage=update.coefficients.advantage,
        weight=update.coefficients.policy,
        logp=_float64(along.logp),
        entropy=_float64(along.entropy),
        share=shares["share"],
    )


def _check_same_parameters(policy: Policy, update: PolicyGradientStep) -> None:
    here, there = ({n: p.shape for n, p in each.model.named_parameters()} for each in (policy, update.policy))
    if here != there:
        raise ValueError("update: a step of a policy with other parameters, expected one made with this Policy")


@dataclass(frozen=True, eq=False)
class _Dotted:
    """What ∇R is dotted with, and `gain`, γP by parameter name, 0 where no token moves the weights."""

    momentum: float
    weight_decay: float
    cosine: float
    gain: dict[str, Tensor | float]


def _dotted(update: PolicyGradientStep, moving: dict[str, Tensor], gradient: SlopeGradient) -> _Dotted:
    momentum = decay = both = rebuilt = 0.0
    actual = sum(dot(v, v) for v in moving.values())
    gains, rows = {}, _padding_rows(update.policy.model)
    for name, g in update.gradient.items():
        parts, of_slope = update.parts(name), gradient.whole(name)
        momentum -= dot(of_slope, parts.momentum)
        decay -= dot(of_slope, parts.decay)
        v = parts.step(g)
        rebuilt += dot(v, v)
        both += dot(v, moving[name]) if name in moving else 0.0
        gains[name] = parts.gain
        if name in rows:  # the step's gradient is 0 there, whatever the tokens are
            gains[name] = without_row(parts.gain * torch.ones_like(g), rows[name])
    return _Dotted(momentum, decay, both / (actual * rebuilt) ** 0.5, gains)


def _steepest(gain: dict[str, Tensor | float], at: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """γP ∘ a gradient, by parameter name."""
    return {name: factor * at(name) for name, factor in gain.items()}


def noise_rollouts(batch: PackedBatch, parts: int) -> list[np.ndarray]:
    """The rollouts of an update whose shares' noise is looked at, in PARTS lots: all of them, or of more than
    NOISE_ROLLOUTS at even distances about so many; none where the evaluation's prompts are in one of `parts`."""
    if parts == 1:
        return []
    apart = -(-len(batch) // NOISE_ROLLOUTS)
    return [np.arange(k * apart, len(batch), PARTS * apart) for k in range(PARTS)]


def _noise_fraction(
    update: PolicyGradientStep, gradient: SlopeGradient, gain: dict[str, Tensor | float], share: np.ndarray, **settings
) -> float | None:
    """Σ_j of the shares' squared standard errors over that of their squares, for prompts drawn at random; None from
    one part.

    With a portion f of n prompts' independent terms, ∇R_k − f ∇R has the mean 0 and f (1 − f) times the variance of ∇R.
    Some of the update's rollouts are enough for each, and those of all parts together are one pass.
    """
    noise = square = 0.0
    row = np.repeat(np.arange(len(update.batch)), update.batch.response_lens)
    parts = cycle(zip(gradient.parts, gradient.portions, strict=True))
    lots = noise_rollouts(update.batch, len(gradient.parts))
    for rows, (part, portion) in zip(lots, parts, strict=False):
        apart = _steepest(gain, lambda name, g=part, f=portion: g[name] - f * gradient.whole(name))
        inside = np.isin(row, rows)
        if not inside.any() or not any(whole(u.any()) for u in apart.values()):
            continue
        along = _along(update.policy, update.batch.take(rows), apart, **settings)
        off = update.clip_factor * update.coefficients.policy[inside] * _float64(along.dlogp)
        noise += float((off**2).sum()) / (portion * (1 - portion))
        square += float((share[inside] ** 2).sum())
    return noise / square if square else None


def _padding_rows(model: nn.Module) -> dict[str, int]:
    """Name of each embedding with a padding row -> that row, without a gradient; tied to a head it has the head's."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            uses[id(p)] = uses.get(id(p), 0) + 1
    padded = {
        id(m.weight): m.padding_idx
        for m in model.modules()
        if isinstance(m, nn.Embedding) and m.padding_idx is not None and uses[id(m.weight)] == 1
    }
    return {name: padded[id(p)] for name, p in model.named_parameters() if id(p) in padded}


def _along(policy: Policy, batch: PackedBatch, tangents: dict[str, Tensor], **settings) -> TokenStats:
    """Tokens of the update, with derivatives along `tangents`.

    These are scaled, in place: half precision holds tangents of a common size better.
    """
    size = max(largest(u) for u in tangents.values())
    if not size:
        raise ValueError("update: no token of the batch depends on the parameters that it moves, expected some that do")
    direction = Direction({name: u.div_(size) for name, u in tangents.items()})
    found = measure(policy, batch, direction, keep_tokens=True, **settings).tokens
    return found._replace(dlogp=found.dlogp.double() * size, dentropy=found.dentropy.double() * size)


def _terms(update: PolicyGradientStep, along: TokenStats) -> dict[str, np.ndarray]:
    """What each token adds to the slope, [n_tokens], by term of the loss."""
    of, dlogp, dentropy = update.coefficients, _float64(along.dlogp), _float64(along.dentropy)
    pairs = {"share": (of.policy, dlogp), "kl": (of.kl, dlogp), "entropy_bonus": (of.entropy, dentropy)}
    return {
        name: np.zeros(0) if weight is None else -update.clip_factor * weight * derivative
        for name, (weight, derivative) in pairs.items()
    }


def _places(batch: PackedBatch, ends: Sequence[int]) -> dict[str, np.ndarray]:
    token = np.concatenate([np.array(batch.response(i), dtype=np.int64) for i in range(len(batch))])
    return {
        "rollout": np.repeat(np.arange(len(batch)), batch.response_lens),
        "position": 1 + place_in_sequence(batch.response_offsets),
        "token": token,
        "end": np.isin(token, ends),
    }


def _float64(values: Tensor) -> np.ndarray:
    return values.double().numpy()
