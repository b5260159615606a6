"""Which parameters a slope comes through: the gradient of the entropy, dotted with the direction piece by piece.

Forward mode gives R'(0) = ∇H·v in one number; reverse mode gives ∇H, and with it every parameter's share. That the
shares add up to the forward-mode slope is also the best test of both.
"""

import re
from collections.abc import Callable

from torch import Tensor

from dentropy.model.direction import Direction
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.model.shards import dot
from dentropy.passes.microbatches import AUTO
from dentropy.passes.slope_gradient import SlopeGradient, slope_gradient
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import SequenceSums


@in_turn
def parameter_attribution(
    policy: Policy,
    batch: PackedBatch,
    direction: Direction,
    sums: SequenceSums,
    *,
    estimator: str = "causal",
    per: str = "token",
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Name of each parameter that moves -> its contribution to the slope; together they are the slope, to rounding.

    One reverse pass of Σ_k (h_k + a_k logp_k) / D with the estimator's coefficients a_k (see `token_attribution`),
    dotted with v. Memory: the activations of token_budget tokens and a gradient for every parameter that moves.

    Args:
        policy, batch, direction: those of the measurement.
        sums: `measure(policy, batch, direction, keep_tokens=True)` at eta = 0.
        estimator, per: as in `slope`.
        token_budget, progress: as in `measure`.

    Returns:
        Contributions in nats per token (or per sequence) per unit of η.

    Raises:
        ValueError: as `token_attribution` and `Direction.on` do.

    Example:
        >>> from dentropy import Direction, measure, sample, slope
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = sample(policy, [tokenizer.encode("17=")], per_prompt=4, max_new_tokens=33)
        >>> direction = Direction({name: p for name, p in policy.model.named_parameters() if "norm" in name})
        >>> sums = measure(policy, batch, direction, keep_tokens=True)
        >>> shares = parameter_attribution(policy, batch, direction, sums)
        >>> abs(sum(shares.values()) - slope(sums).value) < 1e-4
        True
    """
    moving = moving_by_name(policy, direction)
    settings = {"token_budget": token_budget, "progress": progress}
    return parameter_shares(
        moving, slope_gradient(policy, batch, sums, list(moving), estimator=estimator, per=per, **settings)
    )


def parameter_shares(moving: dict[str, Tensor], gradient: SlopeGradient) -> dict[str, float]:
    """∇R·v parameter by parameter, in float64."""
    return {name: dot(gradient.whole(name), v) for name, v in moving.items()}


def moving_by_name(policy: Policy, direction: Direction) -> dict[str, Tensor]:
    """v of each parameter that moves, in its dtype and on its device."""
    names = {id(p): name for name, p in policy.model.named_parameters()}
    return {names[id(p)]: v for p, v in policy.moving(direction)}


_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def by_layer(shares: dict[str, float]) -> dict[str, float]:
    """Shares summed by decoder layer ("layer 3"); parameters outside the layers keep their module's name."""
    return _summed(shares, lambda name: f"layer {m[1]}" if (m := _LAYER.search(name)) else _module(name))


def by_kind(shares: dict[str, float]) -> dict[str, float]:
    """Shares summed over layers by the module's place in its layer ("self_attn.q_proj")."""
    return _summed(shares, lambda name: _module(name[m.end() :] if (m := _LAYER.search(name)) else name))


def _summed(shares: dict[str, float], key: Callable[[str], str]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, share in shares.items():
        sums[key(name)] = sums.get(key(name), 0.0) + share
    return sums


def _module(name: str) -> str:
    """ "lm_head" for "lm_head.weight"; a parameter that belongs to no module keeps its name."""
    return name.rpartition(".")[0] or name
