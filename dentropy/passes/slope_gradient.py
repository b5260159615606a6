"""∇R, whose dot product with a direction is the slope along it: one reverse pass with the estimator's coefficients.

    ∇R = (1/D) Σ_k (∇h_k + a_k ∇logp_k) ,        a_k as in `token_attribution`, held constant.

It is a sum over rollouts, so two halves of the prompts kept apart say how much of it is noise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from dentropy.estimators.attribution import score_coefficients
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.passes.microbatches import AUTO
from dentropy.passes.reverse_mode import gradient
from dentropy.rollouts.batch import PackedBatch
from dentropy.stats.tables import SequenceSums

HALVES_SEED = 0


@dataclass(frozen=True, eq=False)
class SlopeGradient:
    """∇R by parameter name, nats per token (or sequence) per unit of each weight, float32 or better.

    Attributes:
        parts: one dict for all rollouts, or one for each half of the prompts; ∇R is their sum.
        estimator, per: as in `slope`.
    """

    parts: tuple[dict[str, Tensor], ...]
    estimator: str
    per: str

    def whole(self, name: str) -> Tensor:
        """∇R at one parameter."""
        return self.parts[0][name] if len(self.parts) == 1 else self.parts[0][name] + self.parts[1][name]


@in_turn
def slope_gradient(
    policy: Policy,
    batch: PackedBatch,
    sums: SequenceSums,
    names: Sequence[str],
    *,
    estimator: str = "causal",
    per: str = "token",
    halves: bool = False,
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> SlopeGradient:
    """∇R at the parameters `names`. Memory: the activations of token_budget tokens and a gradient, or one per half.

    Args:
        policy, batch: those of the measurement.
        sums: `measure(policy, batch, direction, keep_tokens=True)` at eta = 0.
        names: of the model's parameters.
        estimator, per: as in `slope`.
        halves: keep the gradients of two halves of the prompts, drawn at random, apart; of one prompt there are none.
        token_budget, progress: as in `measure`.

    Raises:
        ValueError: as `token_attribution` does.
    """
    score, total = score_coefficients(sums, estimator=estimator, per=per)
    parameters = [policy.model.get_parameter(name) for name in names]
    row = np.repeat(np.arange(len(batch)), batch.response_lens)
    parts = []
    with _every_embedding_row(policy.model):
        for rows in _halves(batch) if halves else [np.arange(len(batch))]:
            inside = np.isin(row, rows)
            found = gradient(
                policy,
                batch.take(rows),
                parameters,
                np.full(inside.sum(), 1 / total),
                score[inside] / total,
                token_budget=token_budget,
                progress=progress,
            )
            parts.append(dict(zip(names, found, strict=True)))
    return SlopeGradient(tuple(parts), estimator, per)


def _halves(batch: PackedBatch) -> list[np.ndarray]:
    """The rollouts, ascending, of a random half of the prompts and of the others; all of them where there is one prompt
    with responses."""
    prompts = np.unique(batch.group[batch.response_lens > 0])
    drawn = np.random.default_rng(HALVES_SEED).permutation(prompts)[: len(prompts) // 2]
    first = np.isin(batch.group, drawn)
    return [np.flatnonzero(first), np.flatnonzero(~first)] if len(drawn) else [np.arange(len(batch))]


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
