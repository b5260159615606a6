"""Can rollouts of another sampler stand for the policy's own? Base weights, judged as those of any measurement."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dentropy.estimators.importance_sampling import ImportanceResult, importance
from dentropy.estimators.reweighting import as_drawn

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums


def base_weights(
    sums: SequenceSums, *, weights: str = "sequence", per: str = "token", prompts: str = "random"
) -> ImportanceResult | None:
    """The base weights of a table whose rollouts another sampler drew, π/q; None where it says nothing of a sampler.

    From the sampler q to the policy π is a move like any other, and the entropy of π a mean over its rollouts like that
    at θ + η·v. So this is what `importance` gives, its weights being the base weights: moved_value is the policy's
    entropy, base_value the mean of the same entropies over the rollouts as they are, delta what the weights change.
    `importance_diagnostics` has k̂ and a verdict.

    Args:
        sums: a table with `sampler_logp`; prefix weights need its kept tokens.
        weights, per, prompts: as for `importance`.

    Raises:
        ValueError: as `importance` does.

    Example:
        >>> from dataclasses import replace
        >>> import numpy as np, torch
        >>> from dentropy import sequence_sums, token_stats
        >>> from dentropy.estimators import base_weights
        >>> logits = torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> targets = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
        >>> sums = sequence_sums(token_stats(logits, targets), torch.arange(0, 301, 5))
        >>> base_weights(sums) is None
        True
        >>> float(base_weights(replace(sums, sampler_logp=sums.logp)).ess)
        60.0
    """
    if sums.sampler_logp is None:
        return None
    nothing = {"sampler_logp": None, "sampler_tokens": None}
    drawn, policy = replace(as_drawn(sums), **nothing), replace(sums, **nothing)
    return importance(drawn, policy, weights=weights, per=per, prompts=prompts)
