"""A policy-gradient loss, token by token: what its gradient multiplies each token's ∇logp and ∇h with.

    ∇loss = Σ_j (a_j ∇logp_j + e_j ∇h_j) ,        e_j = −c n_j ,
    a_j = n_j [ −A_j r_j active_j + β (1 − exp(ref_j − logp_j)) ] ,
    active_j = not [ (A_j > 0 and r_j > 1 + high) or (A_j < 0 and r_j < 1 − low) ] .

A_j is the advantage, r_j the probability ratio to the old policy, n_j the share of a token in the average, c the
coefficient of the entropy bonus and β that of the KL penalty, exp(ref − logp) − (ref − logp) − 1 per token.
"""

from dataclasses import dataclass

import numpy as np

from dentropy.rollouts.batch import PackedBatch

AVERAGES = ("token", "sequence", "prompt", "length")
RATIOS = ("token", "sequence")
ADVANTAGE_EPSILON = 1e-4  # the constant GRPO adds to a group's standard deviation
# Rewards of a group that differ by less, relative, are equal: sums taken in float32 may leave as much.
ROUNDING = 2.0**-20


@dataclass(frozen=True, eq=False, kw_only=True)
class PolicyLoss:
    """Which loss an update minimizes; as it is, the token-mean surrogate at the policy that sampled the rollouts.

    PPO and GRPO as first published are average="sequence" with clip=(0.2, 0.2), DAPO average="token" with
    clip=(0.2, 0.28), GSPO average="sequence" with ratio="sequence", Dr. GRPO average="length" with advantages of its
    own in the batch.

    Attributes:
        average: n_j: "token" 1/D over D tokens, "sequence" 1/(S T_i) over S rollouts of T_i, "prompt" 1/(P D_g) over
            P prompts of D_g tokens, "length" 1/(S max_length).
        max_length: The constant length of average="length".
        clip: (low, high), positive; None clips nothing.
        ratio: r_j: "token" exp(logp_j − old_j), "sequence" its geometric mean over the rollout.
        old_logp: Log-probabilities under the policy that the ratio is to, [n_tokens] of the update's rollouts in their
            order; None means this policy, where every ratio is 1. A batch's `sampler_logp` counts only as given here.
        reference_logp: Those under the reference of the KL penalty, as `measure(reference, rollouts,
            keep_tokens=True).tokens.logp` gives them.
        kl: β.
        entropy_bonus: c: the loss has −c n_j h_j.

    Raises:
        ValueError: for what is none of these.

    Example:
        >>> PolicyLoss(clip=(0.2, 0.28)).average
        'token'
    """

    average: str = "token"
    max_length: float | None = None
    clip: tuple[float, float] | None = None
    ratio: str = "token"
    old_logp: np.ndarray | None = None
    reference_logp: np.ndarray | None = None
    kl: float = 0.0
    entropy_bonus: float = 0.0

    def __post_init__(self):
        for name, choices in (("average", AVERAGES), ("ratio", RATIOS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r}, expected one of {choices}")
        if (self.average == "length") != (self.max_length is not None):
            raise ValueError(f"max_length: {self.max_length} with average={self.average!r}, expected it for 'length'")
        if self.max_length is not None and not 0 < self.max_length < np.inf:
            raise ValueError(f"max_length: {self.max_length}, expected a positive number")
        if self.clip is not None and not (len(self.clip) == 2 and self.clip[0] > 0 and 0 < self.clip[1] < np.inf):
            raise ValueError(f"clip: {self.clip}, expected two positive numbers, how far below and above 1")
        for name in ("kl", "entropy_bonus"):
            if not np.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)}, expected a finite number")
        if self.kl and self.reference_logp is None:
            raise ValueError(f"kl: {self.kl} without reference_logp, expected the reference's log-probabilities")

    @property
    def needs_logp(self) -> bool:
        """Whether the coefficients depend on this policy's log-probabilities."""
        return self.old_logp is not None or bool(self.kl)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What each token is multiplied with, float64 [n_tokens].

    Attributes:
        advantage: A_j.
        policy: −n_j A_j r_j active_j, of ∇logp_j.
        kl: n_j β (1 − exp(ref_j − logp_j)), of ∇logp_j; None without a penalty.
        entropy: e_j = −c n_j, of ∇h_j; None without a bonus.
    """

    advantage: np.ndarray
    policy: np.ndarray
    kl: np.ndarray | None = None
    entropy: np.ndarray | None = None

    @property
    def logp(self) -> np.ndarray:
        """a_j."""
        return self.policy if self.kl is None else self.policy + self.kl


def coefficients(loss: PolicyLoss, batch: PackedBatch, logp: np.ndarray | None = None) -> Coefficients:
    """The coefficients of `loss` on `batch`, whose rollouts have log-probabilities `logp` [n_tokens] by now.

    logp may be None where the loss does not need it. A loss of the sequence ratio with advantages per token is that of
    GSPO-token, whose gradient it has: s_i A_j ∇logp_j.

    Raises:
        ValueError: without rewards or advantages, where rewards differ within no group, all advantages are 0, no token
            is within the clip range, or values are not one finite number for each token.

    Example:
        >>> batch = PackedBatch.from_lists([[5], [5]], [[7, 2], [8, 2]], advantage=[1.0, -1.0])
        >>> coefficients(PolicyLoss(clip=(0.2, 0.2), old_logp=[-2.0, -1.0, -2.0, -1.0]), batch, np.full(4, -1.5)).policy
        array([-0.        , -0.15163266,  0.41218032,  0.        ])
    """
    if loss.needs_logp and logp is None:
        raise ValueError("logp: None, expected log-probabilities for a loss of old or reference ones")
    advantage, per_token = token_advantages(batch), token_weights(loss, batch)
    old, logp = _values("old_logp", loss.old_logp, batch), _values("logp", logp, batch)
    reference = _values("reference_logp", loss.reference_logp, batch) if loss.kl else None
    ratio = np.ones_like(advantage) if old is None else np.exp(_log_ratio(loss, batch, logp - old))
    policy = -per_token * advantage * ratio
    if loss.clip is not None:
        low, high = loss.clip
        clipped = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
        policy = np.where(clipped, 0.0 * policy, policy)
    if not policy.any():
        raise ValueError(f"batch: no token has an advantage and a ratio within clip={loss.clip}, expected some that do")
    return Coefficients(
        advantage,
        policy,
        kl=None if reference is None else loss.kl * per_token * -np.expm1(reference - logp),
        entropy=-loss.entropy_bonus * per_token if loss.entropy_bonus else None,
    )


def token_advantages(batch: PackedBatch) -> np.ndarray:
    """A_j, float64 [n_tokens]: those of `group_normalized_advantages`, repeated over a rollout's tokens where they are
    per rollout."""
    advantage = group_normalized_advantages(batch)
    return np.repeat(advantage, batch.response_lens) if len(advantage) == len(batch) else advantage


def group_normalized_advantages(batch: PackedBatch) -> np.ndarray:
    """The batch's advantages as they are, else (r − mean)/(std + 1e-4) within each prompt group, float64 [S], 0 in
    groups of rewards that are equal up to rounding."""
    if batch.advantage is not None:
        if not batch.advantage.any():
            raise ValueError("batch: every advantage is 0, expected some that are not")
        return batch.advantage
    if batch.reward is None:
        raise ValueError("batch: no rewards, expected a reward for every rollout")
    _, group = np.unique(batch.group, return_inverse=True)
    count = np.bincount(group)
    low, high = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(low, group, batch.reward)
    np.maximum.at(high, group, batch.reward)
    equal = high - low <= ROUNDING * np.maximum(abs(low), abs(high))
    if equal.all():
        raise ValueError(
            "batch: rewards do not differ within any prompt group, so every advantage is 0; expected "
            "several rollouts per prompt with different rewards"
        )
    centred = np.where(equal[group], 0.0, batch.reward - (np.bincount(group, batch.reward) / count)[group])
    # the sample standard deviation; a group of one has none and its advantage is 0 anyway
    std = np.sqrt(np.bincount(group, centred**2) / np.maximum(count - 1, 1))
    return centred / (std + ADVANTAGE_EPSILON)[group]


def token_weights(loss: PolicyLoss, batch: PackedBatch) -> np.ndarray:
    """n_j, float64 [n_tokens]."""
    lengths, n = batch.response_lens, len(batch)
    if loss.average == "token":
        return np.full(batch.n_tokens, 1 / batch.n_tokens)
    if loss.average == "length":
        return np.full(batch.n_tokens, 1 / (n * loss.max_length))
    if loss.average == "sequence":
        return np.repeat(1 / (n * np.maximum(lengths, 1)), lengths)
    prompts, group = np.unique(batch.group, return_inverse=True)
    return np.repeat(1 / (len(prompts) * np.maximum(np.bincount(group, lengths), 1))[group], lengths)


def _log_ratio(loss: PolicyLoss, batch: PackedBatch, difference: np.ndarray) -> np.ndarray:
    """log r_j, float64 [n_tokens], from logp_j − old_j."""
    if loss.ratio == "token":
        return difference
    row = np.repeat(np.arange(len(batch)), batch.response_lens)
    return (np.bincount(row, difference, len(batch)) / np.maximum(batch.response_lens, 1))[row]


def _values(name: str, values, batch: PackedBatch) -> np.ndarray | None:
    if values is None:
        return None
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (batch.n_tokens,):
        raise ValueError(
            f"{name}: shape {values.shape}, expected one for each of the update's tokens, {batch.n_tokens}"
        )
    if not np.isfinite(values).all():
        token = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"{name}: {values[token]} at token {token}, expected finite log-probabilities")
    return values
