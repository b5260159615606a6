"""∇R, whose dot product with a direction is the slope along it: one reverse pass with the estimator's coefficients.

    ∇R = (1/D) Σ_k (∇h_k + a_k ∇logp_k) ,        a_k as in `token_attribution`, held constant.

It is a sum over rollouts, so parts of the prompts kept apart say how much of it is noise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
from torch import Tensor, nn

from dentropy.estimators.attribution import token_coefficients
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.passes.microbatches import AUTO
from dentropy.passes.reverse_mode import gradient
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import SequenceSums

PARTS_SEED = 0


@dataclass(frozen=True, eq=False)
class SlopeGradient:
    """∇R by parameter name, nats per token (or sequence) per unit of each weight, float32 or better.

    Attributes:
        parts: one dict for each part of the prompts; ∇R is their sum.
        portions: the fraction of the prompts in each.
        estimator, per: as in `slope`.
    """

    parts: tuple[dict[str, Tensor], ...]
    portions: tuple[float, ...]
    estimator: str
    per: str

    def whole(self, name: str) -> Tensor:
        """∇R at one parameter."""
        return reduce(add, (part[name] for part in self.parts))


@in_turn
def slope_gradient(
    policy: Policy,
    batch: PackedBatch,
    sums: SequenceSums,
    names: Sequence[str],
    *,
    estimator: str = "causal",
    per: str = "token",
    parts: int = 1,
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> SlopeGradient:
    """∇R at the parameters `names`. Memory: the activations of token_budget tokens and a gradient of each part.

    Args:
        policy, batch: those of the measurement.
        sums: `measure(policy, batch, direction, keep_tokens=True)` at eta = 0.
        names: of the model's parameters.
        estimator, per: as in `slope`.
        parts: keep the gradients of so many parts of the prompts apart, drawn at random; of fewer prompts, one each.
        token_budget, progress: as in `measure`.

    Raises:
        ValueError: as `token_attribution` does.
    """
    entropy, logp = token_coefficients(sums, estimator=estimator, per=per)
    parameters = [policy.model.get_parameter(name) for name in names]
    row = np.repeat(np.arange(len(batch)), batch.response_lens)
    found, portions = [], []
    with _every_embedding_row(policy.model):
        for rows, portion in prompt_parts(batch, parts):
            inside = np.isin(row, rows)
            of_part = gradient(
                policy,
                batch.take(rows),
                parameters,
                entropy[inside],
                logp[inside],
                token_budget=token_budget,
                progress=progress,
            )
            found.append(dict(zip(names, of_part, strict=True)))
            portions.append(portion)
    return SlopeGradient(tuple(found), tuple(portions), estimator, per)


def prompt_parts(batch: PackedBatch, count: int) -> Iterator[tuple[np.ndarray, float]]:
    """The rollouts of each part, ascending, and its fraction of the prompts with responses."""
    prompts = np.unique(batch.group[batch.response_lens > 0])
    count = max(1, min(count, len(prompts)))
    if count == 1:
        yield np.arange(len(batch)), 1.0
        return
    for drawn in np.array_split(np.random.default_rng(PARTS_SEED).permutation(prompts), count):
        yield np.flatnonzero(np.isin(batch.group, drawn)), len(drawn) / len(prompts)


@contextmanager
def _every_embedding_row(model: nn.Module) -> Iterator[None]:
    """Without padding rows: reverse mode gives them no gradient, though forward mode, rightly, lets them move."""
    padded = [(m, m.padding_idx) for m in model.modules() if getattr(m, "padding_idx", None) is not None]
    try:
        for module, _ in padded:
            module.padding_idx = None
        yield
    finally:
        for module, index in padded:
            module.padding_idx = index
