"""Tables of the enumerable policy, and the choices that the tests of the estimators go through."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from oracles import TinyPolicy
from oracles import take as take

from dentropy.estimators import curvature, predict, slope
from dentropy.stats.tables import SequenceSums, TokenStats

POLICY = TinyPolicy()
ESTIMATORS = ("causal", "exact", "mixed")
FIRST_ORDER = ("dlogp", "dentropy", "entropy_dlogp", "entropy_to_go", "length_to_go", "fisher")
SECOND_ORDER = ("d2logp", "d2entropy", "dentropy_to_go", "entropy_to_go_2", "length_to_go_2")

per_both = pytest.mark.parametrize("per", ["token", "sequence"])
order_both = pytest.mark.parametrize("order", [1, 2])
estimator_all = pytest.mark.parametrize("estimator", ESTIMATORS)
prompts_both = pytest.mark.parametrize("prompts", ["random", "fixed"])


@cache
def columns(eta: float = 0.0) -> dict[str, np.ndarray]:
    """Every column of the policy at θ + η·v, for every prompt and sequence."""
    return POLICY.columns(eta)


def one_batch(seed=0, n_groups=16, per_group=4):
    """Prompt and sequence indices of one batch of rollouts."""
    rng = np.random.default_rng(seed)
    (prompt,), (sequence,) = POLICY.sample(rng, 1, n_groups=n_groups, per_group=per_group)
    return prompt, sequence


def one_table(seed=0, eta=0.0, n_groups=16, per_group=4) -> SequenceSums:
    """The table of the batch of that seed at θ + η·v: the same rollouts at every η."""
    return POLICY.table(*one_batch(seed, n_groups, per_group), columns(eta), per_group=per_group)


@cache
def token_jets(eta: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Those of the policy."""
    return POLICY.token_jets(eta)


def table_with_tokens(prompt, sequence, eta=0.0, per_group=4) -> SequenceSums:
    """The table of a batch that kept its per-token values."""
    logp, entropy = token_jets(eta)
    keep = POLICY.mask[sequence]
    tokens = TokenStats(
        *(
            torch.from_numpy(jet[order, prompt, sequence][keep])
            for order, jet in ((0, logp), (0, entropy), (1, logp), (1, entropy))
        )
    )
    return dataclasses.replace(POLICY.table(prompt, sequence, columns(eta), per_group=per_group), tokens=tokens)


def predicted(sums, eta, order=1, estimator="causal", per="token"):
    """The prediction at η from a table."""
    second = curvature(sums, per=per) if order == 2 else None
    return predict(slope(sums, estimator=estimator, per=per), eta, second)


def in_one_group(sums: SequenceSums) -> SequenceSums:
    """The table with all rollouts of one prompt."""
    return dataclasses.replace(sums, group=np.zeros(len(sums), dtype=int))


def with_value(sums: SequenceSums, name: str, row: int, value: float) -> SequenceSums:
    """The table with one value of a column replaced."""
    return dataclasses.replace(sums, **{name: np.where(np.arange(len(sums)) == row, value, getattr(sums, name))})
