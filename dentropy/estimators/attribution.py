"""Where a slope comes from: the contribution of every generated token, by position, label, length of response and lag.

Everything here adds up: the tokens of a rollout to its contribution, the rollouts to the slope, the bins too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dentropy import large
from dentropy.estimators.columns import EntropyRatio, check_choice, column, entropy_ratio
from dentropy.estimators.groups import Groups
from dentropy.estimators.parts import token_ends
from dentropy.estimators.reweighting import FORM
from dentropy.estimators.slopes import ESTIMATORS
from dentropy.estimators.tokens import KeptTokens, check_length, lengths

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

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
    check_choice("estimator", estimator, ESTIMATORS)
    ratio, ends = entropy_ratio(sums, per, FORM[estimator]), token_ends(sums)
    found = large.empty(int(ends[-1]), np.float64)
    for rows, tokens in KeptTokens.pieces(sums, FORM[estimator]):
        score, _ = _score(tokens, ratio, rows, estimator, per)
        found[ends[rows.start] : ends[rows.stop]] = (tokens.dentropy + tokens.dlogp * score) / ratio.total
    return found


def token_coefficients(sums: SequenceSums, *, estimator: str, per: str) -> tuple[np.ndarray, np.ndarray]:
    """The factors of each token's dh_k and dlogp_k in `token_attribution`, float64 [total tokens] each."""
    check_choice("estimator", estimator, ESTIMATORS)
    ratio, ends = entropy_ratio(sums, per, FORM[estimator]), token_ends(sums)
    of_entropy, of_logp = (large.empty(int(ends[-1]), np.float64) for _ in range(2))
    for rows, tokens in KeptTokens.pieces(sums, FORM[estimator], tangents=False):
        score, _ = _score(tokens, ratio, rows, estimator, per)
        at = slice(ends[rows.start], ends[rows.stop])
        of_entropy[at], of_logp[at] = tokens.weight / ratio.total, score / ratio.total
    return of_entropy, of_logp


@dataclass(frozen=True, eq=False)
class Bins:
    """The slope in parts, arrays [B]: bin b holds the values first[b] to last[b], both included.

    first, last   int64: positions (from 1), labels, lengths in tokens, or lags in tokens
    count         int64, the tokens, rollouts or pairs of tokens in the bin
    contribution  float64, the sum of theirs, in the slope's units; over all bins they sum to it
    stderr        float64, its standard error (the delta method's); None where the groups do not allow one
    """

    first: np.ndarray
    last: np.ndarray
    count: np.ndarray
    contribution: np.ndarray
    stderr: np.ndarray | None


def by_position(sums: SequenceSums, *, estimator: str = "causal", per: str = "token", prompts: str = "random") -> Bins:
    """The token contributions summed by position in the response, in bins 1, 2 to 3, 4 to 7, ...

    With x_ib the sum of rollout i's in bin b times D, s_b their sum over D, and c_b = Σ_i Σ_{k∈b} (T_i − k) dlogp_k
    (T_i dlogp_k for "exact" and "mixed"), the standard errors are those of

        ψ_ib = [x_ib − s_b T_i − (c_b / D) (H_i − H̄ T_i)] / D .

    Args:
        sums: a table with tangent columns and kept tokens.
        estimator, per, prompts: as for `slope`.

    Raises:
        ValueError: as for `token_attribution`; an unknown `prompts`.

    Example:
        >>> import dataclasses, torch
        >>> from dentropy import sequence_sums, slope, token_stats
        >>> from dentropy.estimators import by_position
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits)
        >>> sums = dataclasses.replace(sequence_sums(stats, torch.tensor([0, 3, 4, 6])), tokens=stats)
        >>> bins = by_position(sums)
        >>> bins.last.tolist(), bins.count.tolist()
        ([1, 3], [3, 3])
        >>> bool(abs(bins.contribution.sum() - slope(sums).value) < 1e-12)
        True
    """
    check_choice("estimator", estimator, ESTIMATORS)
    longest = int(lengths(sums).max(initial=0))
    first = 2 ** np.arange(longest.bit_length())
    last = np.minimum(2 * first - 1, longest)

    def doublings(tokens: KeptTokens, _: slice) -> np.ndarray:
        return np.frexp(tokens.position)[1] - 1  # floor(log2), exactly

    return _by_token(doublings, first, last, sums, estimator, per, prompts)


def by_label(
    labels: ArrayLike, sums: SequenceSums, *, estimator: str = "causal", per: str = "token", prompts: str = "random"
) -> Bins:
    """The token contributions summed by label, such as the kind of each token; errors as in `by_position`.

    Args:
        labels: int [total tokens], packed in row order.
        sums, estimator, per, prompts: as for `by_position`.

    Returns:
        Bins, one for each label that occurs, in increasing order; first and last are the label.

    Raises:
        ValueError: as for `by_position`; labels of another shape.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    labels, ends = np.asarray(labels), token_ends(sums)
    check_length("labels", labels, int(ends[-1]), "token")
    found, index = np.unique(labels, return_inverse=True)

    def of_piece(_: KeptTokens, rows: slice) -> np.ndarray:
        return index[ends[rows.start] : ends[rows.stop]]

    return _by_token(of_piece, found, found, sums, estimator, per, prompts)


def by_length(sums: SequenceSums, *, per: str = "token", prompts: str = "random") -> Bins:
    """The slope by length of response, in at most 10 bins of about as many rollouts each.

    The contributions are those of the exact slope: d/dη of E[(H − H̄ T) 1(T in the bin)] / E[T]. The causal ones
    have the same sum, but not by length: there the length of a response is what its tokens lead to, and a token's
    contribution to the causal slope is about all the responses that it could have led to.

    Args:
        sums: a table with tangent columns.
        per, prompts: as for `slope`.

    Raises:
        ValueError: as for `slope`.

    Example:
        >>> import torch
        >>> from dentropy import sequence_sums, slope, token_stats
        >>> from dentropy.estimators import by_length
        >>> seeded = torch.Generator().manual_seed(0)
        >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
        >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits)
        >>> sums = sequence_sums(stats, torch.tensor([0, 3, 4, 6]))
        >>> bins = by_length(sums)
        >>> bins.first.tolist()
        [1, 2, 3]
        >>> bool(abs(bins.contribution.sum() - slope(sums, estimator="exact").value) < 1e-12)
        True
    """
    ratio, n_tokens = entropy_ratio(sums, per, FORM["exact"]), lengths(sums)
    groups = Groups.of(sums.group, prompts)
    dlogp, dentropy = column(ratio.table, "dlogp"), column(ratio.table, "dentropy")
    ordered = np.sort(n_tokens)
    ends = np.ceil(np.arange(1, LENGTH_BINS + 1) / LENGTH_BINS * ordered.size).astype(np.int64) - 1
    last = np.unique(ordered[ends])
    first = ordered[np.searchsorted(ordered, np.append(-1, last[:-1]), side="right")]
    inside = np.searchsorted(last, n_tokens) == np.arange(last.size)[:, None]
    terms, dsize = dentropy + ratio.centred * dlogp, ratio.size * dlogp
    return _bins(first, last, inside.sum(1), [(terms * these, dsize * these) for these in inside], ratio, groups)


def by_lag(sums: SequenceSums, *, per: str = "token", prompts: str = "random") -> Bins:
    """The causal slope by the distance from a token to the later entropy that it leads to: 0, 1, 2 to 3, 4 to 7, ...

    Lag 0 is what the distribution of a token does itself, Σ_k dh_k; lag l is Σ_k dlogp_k (h_{k+l} − H̄), without H̄
    for per="sequence". What a token leads to far on is mostly noise: `slope` leaves it out with `horizon`, and the
    bins beyond it say what that costs. Errors as in `by_position`, c_b = Σ_k dlogp_k · (later tokens in the bin).

    Args:
        sums: a table with tangent columns and kept tokens.
        per, prompts: as for `slope`.

    Raises:
        ValueError: as for `by_position`.
    """
    ratio, groups = entropy_ratio(sums, per, FORM["causal"]), Groups.of(sums.group, prompts)
    longest = int(lengths(sums).max())
    first = np.append(0, 2 ** np.arange((longest - 1).bit_length()))
    last = np.minimum(np.append(0, 2 * first[1:] - 1), longest - 1)
    terms, dsizes = np.zeros((2, first.size, lengths(sums).size))
    counts = np.zeros(first.size, dtype=np.int64)
    for rows, tokens in KeptTokens.pieces(sums, FORM["causal"]):
        terms[0, rows] = tokens.per_rollout(tokens.dentropy)
        counts[0] += tokens.row.size
        for b, lags in enumerate(zip(first[1:].tolist(), last[1:].tolist(), strict=True), 1):
            later, size = tokens.between(*lags)
            dsize = size if per == "token" else np.zeros(size.size)
            terms[b, rows] = tokens.per_rollout(tokens.dlogp * (later - ratio.mean * dsize))
            dsizes[b, rows] = tokens.per_rollout(tokens.dlogp * dsize)
            counts[b] += np.sum(tokens.count_beyond(lags[0] - 1) - tokens.count_beyond(lags[1]))
    return _bins(first, last, counts, zip(terms, dsizes, strict=True), ratio, groups)


def _score(
    tokens: KeptTokens, ratio: EntropyRatio, rows: slice, estimator: str, per: str
) -> tuple[np.ndarray, np.ndarray]:
    """(a, l), float64, of the tokens of some rows: a_k as in `token_attribution`, and l_k, for it holds −H̄ l_k."""
    size = ratio.size[rows][tokens.row]
    if estimator == "exact":
        return ratio.centred[rows][tokens.row], size
    later, count = tokens.beyond(0)
    if estimator == "causal":
        size = count if per == "token" else np.zeros(count.size)
    return later - ratio.mean * size, size


def _by_token(
    index_of: Callable[[KeptTokens, slice], np.ndarray],
    first: np.ndarray,
    last: np.ndarray,
    sums: SequenceSums,
    estimator: str,
    per: str,
    prompts: str,
) -> Bins:
    """Bins of the token contributions; `index_of` gives the bin of each token of some rows."""
    ratio, groups = entropy_ratio(sums, per, FORM[estimator]), Groups.of(sums.group, prompts)
    terms, dsizes = np.zeros((2, first.size, lengths(sums).size))
    count = np.zeros(first.size, dtype=np.int64)
    for rows, tokens in KeptTokens.pieces(sums, FORM[estimator]):
        score, size = _score(tokens, ratio, rows, estimator, per)
        index = index_of(tokens, rows)
        place = index * tokens.n_tokens.size + tokens.row  # by bin and rollout
        values = tokens.dentropy + tokens.dlogp * score, tokens.dlogp * size
        for found, of_tokens in zip((terms, dsizes), values, strict=True):
            sums_of = np.bincount(place, weights=of_tokens, minlength=first.size * tokens.n_tokens.size)
            found[:, rows] = sums_of.reshape(first.size, -1)
        count += np.bincount(index, minlength=first.size)
    return _bins(first, last, count, zip(terms, dsizes, strict=True), ratio, groups)


def _bins(first, last, count, parts, ratio: EntropyRatio, groups: Groups) -> Bins:
    """Bins from (x_b, dT_b) [S] of each, `terms` and `dmean` of `EntropyRatio.influence`."""
    refused, contribution, stderr = groups.refusal() is not None, [], []
    for terms, dsize in parts:
        contribution.append(terms.sum() / ratio.total)
        stderr.append(groups.stderr(ratio.influence(terms, dsize))[0])
    return Bins(first, last, count, np.array(contribution), None if refused else np.array(stderr))
