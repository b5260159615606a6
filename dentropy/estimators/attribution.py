"""Where a slope comes from: the contribution of every generated token, by position and by length of response.

Everything here adds up: the tokens of a rollout to its contribution, the rollouts to the slope, the bins too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators.columns import check_choice, column, entropy_ratio
from dentropy.estimators.slopes import ESTIMATORS

if TYPE_CHECKING:
    from dentropy.stats.tables import SequenceSums

LENGTH_BINS = 10


def token_attribution(sums: SequenceSums, *, estimator: str = "causal", per: str = "token") -> np.ndarray:
    """Contribution of every generated token to the slope, from the table's kept tokens.

    Token k of rollout i contributes (dh_k + dlogp_k a_k) / D: how its own distribution's entropy changes, and
    what it makes more or less likely. With H̄, D and T_i → 1 for per="sequence" as for `slope`, a_k is

        "causal"   Σ_{j>k} (h_j − H̄)          per="sequence": Σ_{j>k} h_j
        "exact"    H_i − H̄ T_i
        "mixed"    Σ_{j>k} h_j − H̄ T_i        the baseline is "entropy"

    Args:
        sums: a table with tangent columns and kept tokens.
        estimator, per: as for `slope`.

    Returns:
        float64 [total tokens], packed in row order, in nats per token (or per sequence) per unit of η. They
        sum to the slope, and those of each rollout to its contribution.

    Raises:
        ValueError: an unknown choice, no kept tokens or tangents, no rollout or no token at all, another
            number of tokens than n_tokens says, a value that is not finite.

    Example:
        >>> import dataclasses, torch
        >>> from dentropy import sequence_sums, slope, token_stats
        >>> from dentropy.estimators import token_attribution
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits)
        >>> sums = dataclasses.replace(sequence_sums(stats, torch.tensor([0, 3, 4, 6])), tokens=stats)
        >>> bool(abs(token_attribution(sums).sum() - slope(sums).value) < 1e-12)
        True
    """
    score, total = score_coefficients(sums, estimator=estimator, per=per)
    _, dlogp, dentropy = _kept_tokens(sums, _lengths(sums))
    return (dentropy + dlogp * score) / total


def score_coefficients(sums: SequenceSums, *, estimator: str, per: str) -> tuple[np.ndarray, float]:
    """(a, D): the factor a_k of each token's dlogp_k in `token_attribution`, float64 [total tokens], and D."""
    check_choice("estimator", estimator, ESTIMATORS)
    ratio, n_tokens = entropy_ratio(sums, per), _lengths(sums)
    h, _, _ = _kept_tokens(sums, n_tokens)
    if estimator == "exact":
        return np.repeat(ratio.centred, n_tokens), ratio.total
    score = _sum_of_later(h, n_tokens)
    if estimator == "mixed":
        score -= ratio.mean * np.repeat(ratio.size, n_tokens)
    elif per == "token":
        score -= ratio.mean * (np.repeat(n_tokens, n_tokens) - _positions(n_tokens))
    return score, ratio.total


@dataclass(frozen=True, eq=False)
class Bins:
    """Contributions summed over bins, arrays [B]: bin b holds the values first[b] to last[b], both included.

    first, last   int64, positions (from 1) or lengths in tokens
    count         int64, the tokens or rollouts in the bin
    contribution  float64, the sum of theirs
    """

    first: np.ndarray
    last: np.ndarray
    count: np.ndarray
    contribution: np.ndarray


def by_position(contributions: np.ndarray, sums: SequenceSums) -> Bins:
    """Token contributions summed by position in the response, in bins 1, 2 to 3, 4 to 7, ...

    Args:
        contributions: float [total tokens], such as `token_attribution` gives.
        sums: the table they are of.

    Raises:
        ValueError: another number of contributions than the table has tokens.

    Example:
        >>> import numpy as np
        >>> from dentropy.estimators import by_position
        >>> from dentropy.stats.tables import SequenceSums
        >>> sums = SequenceSums(n_tokens=np.array([3.0, 1.0]), logp=np.zeros(2), entropy=np.zeros(2),
        ...                     group=np.arange(2), rollout=np.arange(2))
        >>> by_position(np.array([1.0, 2.0, 3.0, 10.0]), sums).contribution
        array([11.,  5.])
    """
    n_tokens = _lengths(sums)
    _check_length("contributions", contributions, n_tokens.sum(), "token")
    positions = _positions(n_tokens)
    doublings = np.frexp(positions)[1] - 1  # floor(log2), exactly
    first = 2 ** np.arange(doublings.max(initial=-1) + 1)
    return _bins(doublings, contributions, first, np.minimum(2 * first - 1, positions.max(initial=0)))


def by_length(contributions: np.ndarray, sums: SequenceSums) -> Bins:
    """Rollout contributions summed by length of response, in at most 10 bins of about as many rollouts each.

    Args:
        contributions: float [S], such as those of `slope`.
        sums: the table they are of.

    Raises:
        ValueError: another number of contributions than the table has rollouts.

    Example:
        >>> import numpy as np
        >>> from dentropy.estimators import by_length
        >>> from dentropy.stats.tables import SequenceSums
        >>> sums = SequenceSums(n_tokens=np.array([3.0, 1.0, 3.0]), logp=np.zeros(3), entropy=np.zeros(3),
        ...                     group=np.arange(3), rollout=np.arange(3))
        >>> by_length(np.array([1.0, 2.0, 10.0]), sums).contribution
        array([ 2., 11.])
    """
    n_tokens = _lengths(sums)
    _check_length("contributions", contributions, n_tokens.size, "rollout")
    ordered = np.sort(n_tokens)
    ends = np.ceil(np.arange(1, LENGTH_BINS + 1) / LENGTH_BINS * ordered.size).astype(np.int64) - 1
    last = np.unique(ordered[ends])
    first = ordered[np.searchsorted(ordered, np.append(-1, last[:-1]), side="right")]
    return _bins(np.searchsorted(last, n_tokens), contributions, first, last)


def _bins(index: np.ndarray, contributions: np.ndarray, first: np.ndarray, last: np.ndarray) -> Bins:
    weights = np.asarray(contributions, dtype=np.float64)
    return Bins(
        first=first,
        last=last,
        count=np.bincount(index, minlength=first.size),
        contribution=np.bincount(index, weights=weights, minlength=first.size),
    )


def _lengths(sums: SequenceSums) -> np.ndarray:
    return column(sums, "n_tokens").astype(np.int64)


def _positions(n_tokens: np.ndarray) -> np.ndarray:
    """The position in its response of every packed token, from 1, int64 [total tokens]."""
    starts = np.cumsum(n_tokens) - n_tokens
    return np.arange(1, n_tokens.sum() + 1) - np.repeat(starts, n_tokens)


def _sum_of_later(values: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """Σ_{j>k} of `values` within each response, float64 [total tokens]."""
    # The running sum of deviations from a response's mean returns to 0 at its end, so that one sum over the
    # whole batch does not lose digits as it goes on.
    row = np.repeat(np.arange(n_tokens.size), n_tokens)
    means = np.bincount(row, weights=values, minlength=n_tokens.size) / np.maximum(n_tokens, 1)
    running = np.cumsum(values - means[row])
    ends = np.cumsum(n_tokens)[row] - 1
    return running[ends] - running + means[row] * (n_tokens[row] - _positions(n_tokens))


def _kept_tokens(sums: SequenceSums, n_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """entropy, dlogp and dentropy of every kept token, float64 [total tokens] each."""
    if sums.tokens is None:
        raise ValueError("sums.tokens: None, expected those of a table measured with keep_tokens=True")
    found = []
    for name in ("entropy", "dlogp", "dentropy"):
        values = getattr(sums.tokens, name)
        if values is None:
            raise ValueError(f"sums.tokens.{name}: None, expected those of a pass with a direction")
        values = np.asarray(values, dtype=np.float64)
        _check_length(f"sums.tokens.{name}", values, n_tokens.sum(), "token")
        finite = np.isfinite(values)
        if not finite.all():
            token = int(np.argmin(finite))
            raise ValueError(f"sums.tokens.{name}: {values[token]} at token {token}, expected finite")
        found.append(values)
    return tuple(found)


def _check_length(argument: str, values: np.ndarray, expected: int, unit: str) -> None:
    if np.shape(values) != (expected,):
        raise ValueError(f"{argument}: shape {np.shape(values)}, expected ({expected},): one value per {unit}")
