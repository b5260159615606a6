"""The change of pass@k: the probability that at least one of k answers to a prompt is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb

import numpy as np

from dentropy.estimators.groups import Groups
from dentropy.estimators.mean_change import MeanChange, Rollouts, Scores, ratio_of_sums
from dentropy.estimators.reward_forecast import advantages

# With fewer prompts than this in which anything can change, intervals cover less than they say.
FEW_PROMPTS = 10


def pass_at_k_forecast(right: np.ndarray, k: int, rollouts: Rollouts) -> MeanChange:
    """Slope and change of pass@k, a mean over prompts, from n ≥ k rollouts each of which c are right.

    Of a prompt, with r_i = 1 for a right rollout and e_k the elementary symmetric polynomial of n numbers,

        now      1 − C(n−c, k) / C(n, k)
        at η     1 − e_k(1 − w_1 r_1, …, 1 − w_n r_n) / C(n, k)
        slope    1/n · Σ_i k r_i ℓ'_i C(n−c, k−1) / C(n−1, k−1)

    All are unbiased: the average over the k-subsets of the rollouts. k = 1 is the mean reward and takes its baseline.

    With fixed prompts it takes n > k: a rollout less must still do, to tell how they vary. `check_pass_at_k` asks.
    """
    groups = rollouts.groups()
    members = groups.members[groups.row]
    each = rollouts.prompts == "fixed"

    def of(scores: Scores):
        if k == 1:
            terms = advantages(right, rollouts) * scores.rollout
        else:
            terms = np.empty_like(right)
            for rows, n_right in alike:
                terms[rows] = _terms(scores.rollout[rows], n_right, k, scores.linear, each)
        return ratio_of_sums(terms / members, 1 / members, rollouts, doubts=doubts)

    wrong = groups.sums(1 - right)
    alike = list(_alike(right, groups))
    live = int(np.sum((wrong < groups.members) & (wrong >= max(k - 1, 1))))
    doubts = ()
    if live < FEW_PROMPTS:
        doubts = (
            f"pass@{k} can change in {live} of {groups.labels.size} prompts, below {FEW_PROMPTS}: its interval may be "
            "too narrow",
        )
    kinds, of_kind = np.unique(np.stack([wrong, groups.members]), axis=1, return_inverse=True)
    now = np.array([1 - comb(int(w), k) / comb(int(n), k) for w, n in kinds.T])[of_kind.reshape(-1)]
    changes = {eta: of(scores) for eta, scores in rollouts.at.items()}
    return MeanChange(base=float(np.mean(now)), slope=of(rollouts.first), changes=changes)


def check_pass_at_k(
    ks: Sequence[int], reward: np.ndarray | None, groups: Groups, sampler_logp: np.ndarray | None = None
) -> None:
    """ValueError unless rewards [S] are 0 or 1, and every k a whole number that each prompt has rollouts enough for.

    Products of base weights, of rollouts of another sampler, are not there.
    """
    if not len(ks):
        return
    if sampler_logp is not None:
        raise ValueError(
            "pass_at_k: of rollouts with sampler_logp, expected the policy's own: those of another sampler are not "
            "reweighted for pass@k (pass@1 is the mean reward, which is)"
        )
    if reward is None:
        raise ValueError("reward: None, expected rewards of 0 or 1 for pass@k")
    binary = (reward == 0) | (reward == 1)
    if not binary.all():
        row = int(np.argmin(binary))
        raise ValueError(f"reward: {reward[row]:g} at row {row}, expected 0 or 1 for pass@k")
    fewest = int(np.argmin(groups.members))
    for k in ks:
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
            raise ValueError(f"pass_at_k: {k!r}, expected whole numbers of at least 1")
        least = k + (groups.prompts == "fixed")
        if k > 1 and groups.members[fewest] < least:
            fixed = ", one more than k, with prompts='fixed'" if least > k else ""
            raise ValueError(
                f"pass_at_k: {k}, but group {int(groups.labels[fewest])} has {int(groups.members[fewest])} rollouts, "
                f"expected {least} or more in every group{fixed}"
            )


def _alike(right: np.ndarray, groups: Groups) -> Iterator[tuple[np.ndarray, int]]:
    """The prompts with as many rollouts and as many right ones, together: rows [P, n], of each prompt the right ones
    first, and their number."""
    rows = np.lexsort((1 - right, groups.row))
    first, n_right = np.cumsum(groups.members) - groups.members, groups.sums(right).astype(np.int64)
    for n, c in np.unique(np.stack([groups.members, n_right]), axis=1).T.tolist():
        starts = first[(groups.members == n) & (n_right == c)]
        yield rows[starts[:, None] + np.arange(n)], c


def _terms(scores: np.ndarray, n_right: int, k: int, linear: bool, each: bool) -> np.ndarray:
    """Of P prompts, from scores [P, n], those of right ones first: the change or slope of each, [P, 1]; with `each`,
    numbers per rollout whose mean that is, and which vary as it does, [P, n].

    They are the jackknife's pseudo-values n V − (n−1) V_{−i}. V averages over subsets, so it is the mean of the V_{−i}.
    """
    own, n = scores[:, :n_right], scores.shape[1]
    wrong = n - n_right
    value = _change(own, wrong, n, k, linear)[:, None]
    if not each:
        return value
    others = np.zeros_like(scores)
    # A score of 0 drops a right one from the polynomials, as leaving it out does.
    for i in range(n_right):
        others[:, i] = _change(np.where(np.arange(n_right) == i, 0.0, own), wrong, n - 1, k, linear)
    if wrong:
        others[:, n_right:] = _change(own, wrong - 1, n - 1, k, linear)[:, None]
    return n * value - (n - 1) * others


def _change(scores: np.ndarray, wrong: int, n: int, k: int, linear: bool) -> np.ndarray:
    """(C(n−c, k) − e_k) / C(n, k), or its derivative, from the scores of the right ones [R, c], of R prompts: [R].

    e_k = Σ_j e_j(−s) C(n−c, k−j), for the n−c wrong ones stand in it with 1. The term of j = 0 is what pass@k is now;
    that of j = 1 is the derivative.
    """
    last = 1 if linear else k
    polynomials, whole = _elementary(-scores, last), comb(n, k)
    return -polynomials[:, 1:] @ [comb(wrong, k - j) / whole for j in range(1, last + 1)]


def _elementary(numbers: np.ndarray, last: int) -> np.ndarray:
    """e_0 … e_last of each row of `numbers` [R, c]: [R, last + 1]."""
    found = np.zeros((len(numbers), last + 1))
    found[:, 0] = 1.0
    for number in numbers.T:
        found[:, 1:] += number[:, None] * found[:, :-1]
    return found
