"""From per-token values to the table with one row per rollout."""

from __future__ import annotations

import numpy as np

from dentropy.checks import check_tensor, checked_cu_seqlens, checked_group
from dentropy.tables import SequenceSums, TokenStats


def sequence_sums(stats: TokenStats, cu_seqlens, *, group=None) -> SequenceSums:
    """The columns of `SequenceSums`, summed over the tokens of each sequence in float64.

    Args:
        stats: packed per-token values, [N] floating tensors on any device: the sequences one after the other.
        cu_seqlens: [S + 1], int32 or int64 (tensor, array or list): where each sequence starts, and N at the
            end; it starts at 0 and never decreases. A sequence without tokens gives a row of zeros.
        group: [S] integers: the prompt of each sequence, for the standard errors; None: each its own group.

    Returns:
        SequenceSums with `rollout` = 0..S−1 and without per-token values; columns whose derivatives `stats`
        does not have are None.

    Raises:
        ValueError: cu_seqlens or group that do not fit; fields of `stats` that do not belong together; a
            value that is not finite, with its name, rollout and place in the rollout.

    Example:
        >>> import torch
        >>> from dentropy import sequence_sums
        >>> from dentropy.tables import TokenStats
        >>> stats = TokenStats(logp=torch.tensor([-1.0, -2.0, -3.0]), entropy=torch.tensor([1.0, 1.5, 2.0]))
        >>> sequence_sums(stats, [0, 2, 3]).logp.tolist()
        [-3.0, -3.0]
    """
    check_stats(stats)
    ends = checked_cu_seqlens(cu_seqlens, len(stats.logp))
    sequences = len(ends) - 1
    group = checked_group(group, sequences)
    tokens = {name: value.detach().cpu().double().numpy() for name, value in stats._asdict().items()
              if value is not None}
    for name, values in tokens.items():
        _raise_if_not_finite(name, values, ends)

    lengths = np.diff(ends)
    columns = {name: _segment_sum(values, ends) for name, values in tokens.items()}
    if "dlogp" in tokens:
        dlogp, entropy = tokens["dlogp"], tokens["entropy"]
        tokens_left = np.repeat(ends[1:], lengths) - 1.0 - np.arange(len(dlogp))
        columns["entropy_dlogp"] = _segment_sum(entropy * dlogp, ends)
        columns["length_to_go"] = _segment_sum(tokens_left * dlogp, ends)
        # What is left of the entropy is what is left of its deviation from the sequence's mean, plus that
        # mean for each token left. The running sum of the deviations returns to 0 at the end of every
        # sequence, so one sum over all tokens is exact to rounding within each.
        means = columns["entropy"] / np.maximum(lengths, 1)
        running = np.cumsum(entropy - np.repeat(means, lengths))
        at_end = np.repeat(running[ends[1:] - 1], lengths) if len(running) else running
        columns["entropy_to_go"] = (means * columns["length_to_go"]
                                    + _segment_sum((at_end - running) * dlogp, ends))
    return SequenceSums(n_tokens=lengths, **columns, group=group, rollout=np.arange(sequences))


def check_stats(stats) -> None:
    """`stats` is a TokenStats of tensors of one length [N]; each order is there whole or not at all."""
    if not isinstance(stats, TokenStats):
        raise ValueError(f"stats is a {type(stats).__name__}, expected a TokenStats")
    for name, value in stats._asdict().items():
        if name == "logp":
            check_tensor("stats.logp", value, (None,), "[N], one value per token")
        elif name == "entropy" or value is not None:
            shape = list(stats.logp.shape)
            check_tensor(f"stats.{name}", value, tuple(shape), f"{shape} as stats.logp")
    for first, second in (("dlogp", "dentropy"), ("d2logp", "d2entropy")):
        if (getattr(stats, first) is None) != (getattr(stats, second) is None):
            raise ValueError(f"stats.{first} and stats.{second}: one is None, expected both or neither")
    if stats.d2logp is not None and stats.dlogp is None:
        raise ValueError("stats.dlogp is None, expected a tensor beside stats.d2logp")


def _segment_sum(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[S] sums of `values` [N] over the segments ends[i]:ends[i + 1]; those without elements give 0."""
    out = np.zeros(len(ends) - 1)
    filled = ends[1:] > ends[:-1]
    if filled.any():
        out[filled] = np.add.reduceat(values, ends[:-1][filled])
    return out


def _raise_if_not_finite(name: str, values: np.ndarray, ends: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        rollout = int(np.searchsorted(ends, bad[0], side="right")) - 1
        raise ValueError(f"{name} of rollout {rollout} is not finite (token {bad[0] - ends[rollout]}: "
                         f"{values[bad[0]]})")
