"""What is refused of a table, by every estimator alike, and the ratio that each starts from."""

import dataclasses

import numpy as np
import pytest
from tables import FIRST_ORDER, one_table, per_both, take, with_value

from dentropy.estimators import slope
from dentropy.estimators.columns import entropy_ratio


@per_both
def test_the_ratio_and_its_influence(per):
    sums = one_table()
    ratio = entropy_ratio(sums, per, "sequence")
    size = sums.n_tokens if per == "token" else np.ones(64)
    assert ratio.total == size.sum() and ratio.mean == pytest.approx(sums.entropy.sum() / size.sum(), rel=1e-14)
    assert abs(ratio.centred.sum()) < 1e-12 * sums.entropy.sum()
    # counting rollout 5 twice
    again = np.append(np.arange(64), 5)
    moved = sums.entropy[again].sum() / size[again].sum() - ratio.mean
    assert ratio.centred[5] / (ratio.total + size[5]) == pytest.approx(moved, rel=1e-10)


@per_both
def test_bad_tables(per):
    sums = one_table()
    for table, message in (
        (take(sums, []), "sums: no rows, expected at least one rollout"),
        (dataclasses.replace(sums, n_tokens=np.zeros(64)), "sums.n_tokens: 0 for all 64 rollouts, expected tokens"),
        (dataclasses.replace(sums, **dict.fromkeys(FIRST_ORDER)), "sums.dlogp: None, expected .* a direction"),
        (with_value(sums, "dentropy", 5, np.nan), r"sums.dentropy: nan for rollout 5 \(1 of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            slope(table, per=per)
