"""Published rules of thumb for what a token of an update does to entropy, and how far they agree with exact shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PROXIES = ("covariance", "surprise", "STEER", "discriminant")
RESAMPLES, SEED, LEVEL = 400, 0, 0.95
ROUNDING = 1e-12  # of sums of squares, relative


def update_proxies(
    advantage: np.ndarray, logp: np.ndarray, entropy: np.ndarray, mean_discriminant: np.ndarray
) -> dict[str, np.ndarray]:
    """Each proxy at the update's tokens, float64 [n_tokens], signed so that positive raises entropy.

    With advantage A, log-probability and probability π of the token that was sampled, and h the entropy there:

        "covariance"    −(logp − mean)(A − mean), means over the tokens: Cui et al., "The Entropy Mechanism of
                        Reinforcement Learning for Reasoning Language Models" (2025). Exact in sum for natural gradients
        "surprise"      −A (logp + h): the same with the mean of log-probabilities in place at each token
        "STEER"         −A π(1 − π)(logp + h): Hao et al., "Rethinking Entropy Interventions in RLVR: An Entropy Change
                        Perspective" (2025), which weighs tokens by it
        "discriminant"  −A (S − E_p S), S = π(logp + h): S* of Wang et al., "On the Entropy Dynamics in Reinforcement
                        Fine-Tuning of Large Language Models" (2026). Exact for one tabular softmax and a plain gradient

    Args:
        advantage, logp, entropy: of each token, [n_tokens].
        mean_discriminant: E_p S, what `dentropy.passes.mean_discriminant` gives.

    Example:
        >>> import numpy as np
        >>> found = update_proxies(np.array([1.0, -1.0]), np.log([0.9, 0.1]), np.full(2, 0.325), np.zeros(2))
        >>> (found["surprise"] < 0).tolist()    # a likely token made likelier, an unlikely one made less likely
        [True, True]
    """
    p, above = np.exp(logp), logp + entropy
    return {
        "covariance": -(logp - logp.mean()) * (advantage - advantage.mean()),
        "surprise": -advantage * above,
        "STEER": -advantage * p * (1 - p) * above,
        "discriminant": -advantage * (p * above - mean_discriminant),
    }


@dataclass(frozen=True)
class Agreement:
    """One measure of agreement: its value, the 95% interval over resampled prompts (None for one prompt), and both
    corrected for the noise of the exact shares (None where that is unknown or all there is, or has no correction)."""

    value: float
    interval: tuple[float, float] | None
    corrected: float | None
    corrected_interval: tuple[float, float] | None


@dataclass(frozen=True)
class ProxyGrade:
    """How far a proxy agrees with the exact shares.

    Attributes:
        rank_correlation: Spearman's, equal values sharing their mean rank. It has no correction: the noise of ranks is
            not that of squares, which a few large shares can make.
        r_squared: the squared correlation, what of the shares' variance is linear in the proxy. Corrected: over
            reliability.
        sign_agreement: the fraction of tokens where both have the same sign. It has no correction.
        mean: of the proxy over the tokens: its prediction of the sign of ΔH.
        mean_interval: 95%, over resampled prompts; None for one prompt.
    """

    rank_correlation: Agreement
    r_squared: Agreement
    sign_agreement: Agreement
    mean: float
    mean_interval: tuple[float, float] | None


def grade_proxy(
    proxy: np.ndarray, share: np.ndarray, group: np.ndarray, reliability: float | None = None
) -> ProxyGrade:
    """Grade a proxy by the exact shares of the same tokens.

    A share is measured with noise, so that even the truth would not agree with it wholly: with the reliability ρ, the
    part of Σ share² that is not noise, a correlation is attenuated by √ρ and its square by ρ (Spearman, "The proof and
    measurement of association between two things", 1904).

    Args:
        proxy, share: float [n_tokens].
        group: the prompt of each token, [n_tokens]: these are resampled for the intervals, ρ is held as it is.
        reliability: ρ, as `UpdateAttribution` has it.

    Raises:
        ValueError: for shapes that differ, values that are not finite, and where all values of either are equal.

    Example:
        >>> import numpy as np
        >>> grade = grade_proxy(np.arange(6.0) - 2.5, np.array([-3.0, -2, -1, 1, 3, 2]), np.repeat([0, 1, 2], 2))
        >>> round(grade.rank_correlation.value, 3), grade.sign_agreement.value
        (0.943, 1.0)
    """
    proxy, share, group = np.asarray(proxy, float), np.asarray(share, float), np.asarray(group)
    for name, values in (("proxy", proxy), ("share", share)):
        if values.shape != group.shape or values.ndim != 1:
            raise ValueError(f"{name}: shape {values.shape}, expected {group.shape} as group has, one for each token")
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: {values[int(np.argmin(np.isfinite(values)))]}, expected finite values")
        if values.size == 0 or (values == values[0]).all():
            raise ValueError(f"{name}: all {values.size} values are equal, expected some that differ")
    prompts, row = np.unique(group, return_inverse=True)
    weights = np.ones((1, prompts.size))  # as it is, and resampled
    if prompts.size > 1:
        drawn = np.random.default_rng(SEED).multinomial(
            prompts.size, np.full(prompts.size, 1 / prompts.size), size=RESAMPLES
        )
        weights = np.concatenate([weights, drawn])
    known = reliability is not None and reliability > 0
    divisors = [None, reliability if known else None, None, None]
    *agreements, mean = (
        _agreement(float(values[0]), values[1:], divisor)
        for values, divisor in zip(_measures(proxy, share, row, weights), divisors, strict=True)
    )
    return ProxyGrade(*agreements, mean.value, mean.interval)


def _agreement(value: float, drawn: np.ndarray, divisor: float | None) -> Agreement:
    interval = None
    if drawn.size:
        low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        interval = low, high
    if divisor is None:
        return Agreement(value, interval, None, None)
    corrected = None if interval is None else (interval[0] / divisor, interval[1] / divisor)
    return Agreement(value, interval, value / divisor, corrected)


def _measures(proxy: np.ndarray, share: np.ndarray, row: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """Three measures and the proxy's mean where the prompt `row` of a token counts as often as `weights` says, [draws,
    prompts]: each [draws]. All but that of ranks are made of sums over each prompt, of values less their mean."""
    same, x, y = np.sign(proxy) == np.sign(share), proxy - proxy.mean(), share - share.mean()
    sums = np.stack([np.bincount(row, of) for of in (np.ones_like(x), same, x, y, x * x, y * y, x * y)], 1)
    n, same, x, y, xx, yy, xy = (weights @ sums).T
    places = [np.unique(values, return_inverse=True)[1] for values in (proxy, share)]
    ranks = np.array([_rank_correlation(places, weight[row]) for weight in weights])
    squares = _variation(xx, x, n) * _variation(yy, y, n)
    return [ranks, (xy - x * y / n) ** 2 / squares, same / n, proxy.mean() + x / n]


def _variation(xx: np.ndarray, x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Σ (x − mean)² from sums over n values, NaN where it is rounding alone."""
    found = xx - x * x / n
    return np.where(found > ROUNDING * xx, found, np.nan)


def _rank_correlation(places: list[np.ndarray], weight: np.ndarray) -> float:
    """Spearman's of two rows of values whose order is `places`, each as often as its weight; NaN where one is equal."""
    total, ranks, squares = weight.sum(), [], 1.0
    for place in places:
        counts = np.bincount(place, weight)
        middle = np.cumsum(counts) - (counts + total) / 2  # of equal values, less the mean of all ranks
        ranks.append(middle[place])
        squares *= counts @ middle**2
    return float((weight * ranks[0]) @ ranks[1] / squares**0.5) if squares > 0 else float("nan")
