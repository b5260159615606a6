"""From per-token values to the table with one row per rollout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dentropy.stats.checks import check_stats, check_sums, checked_cu_seqlens, checked_group
from dentropy.stats.dispatch import kernels_serve
from dentropy.stats.tables import SequenceSums, TokenStats


def sequence_sums(stats: TokenStats, cu_seqlens, *, group=None) -> SequenceSums:
    """The columns of `SequenceSums`, summed over the tokens of each sequence in float64.

    On CUDA one kernel makes all columns, which are then copied to the host once.

    Args:
        stats: packed per-token values, [N] floating tensors on one device: the sequences one after the other.
        cu_seqlens: [S + 1], int32 or int64 (tensor, array or list): where each sequence starts, and N at the
            end; it starts at 0 and never decreases. A sequence without tokens gives a row of zeros.
        group: [S] integers: the prompt of each sequence, for the standard errors; None: each its own group.

    Returns:
        SequenceSums with `rollout` = 0..S−1 and without per-token values; columns whose derivatives `stats`
        does not have are None.

    Raises:
        ValueError: cu_seqlens or group that do not fit; fields of `stats` that do not belong together; a
            value that is not finite, with its name, rollout and place in the rollout; a sum of finite values
            that leaves the range of float64, with its name and rollout.

    Example:
        >>> import torch
        >>> from dentropy import TokenStats, sequence_sums
        >>> stats = TokenStats(logp=torch.tensor([-1.0, -2.0, -3.0]), entropy=torch.tensor([1.0, 1.5, 2.0]))
        >>> sequence_sums(stats, [0, 2, 3]).logp.tolist()
        [-3.0, -3.0]
    """
    return table_of(_columns, stats, cu_seqlens, group)


def table_of(
    columns_of: Callable[[TokenStats, np.ndarray], dict[str, np.ndarray]], stats: TokenStats, cu_seqlens, group
) -> SequenceSums:
    """`sequence_sums` with its checks, whatever makes the columns but for `group` and `rollout`."""
    check_stats(stats)
    ends = checked_cu_seqlens(cu_seqlens, len(stats.logp))
    group = checked_group(group, len(ends) - 1)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name
        columns = columns_of(stats, ends)
    check_sums(columns, stats, ends)
    return SequenceSums(**columns, group=group, rollout=np.arange(len(ends) - 1))


def _columns(stats: TokenStats, ends: np.ndarray) -> dict[str, np.ndarray]:
    return (_kernel_columns if kernels_serve(stats.logp, float64=True) else plain_columns)(stats, ends)


def _kernel_columns(stats: TokenStats, ends: np.ndarray) -> dict[str, np.ndarray]:
    from dentropy.kernels import sequence_sums as kernel  # Triton loads on first use

    columns = kernel.sequence_sums(*stats, cu_seqlens=torch.tensor(ends, device=stats.logp.device))
    return dict(zip(kernel.COLUMNS, columns.cpu().numpy()))


def plain_columns(stats: TokenStats, ends: np.ndarray) -> dict[str, np.ndarray]:
    """The columns in NumPy, whatever the device."""
    tokens = {name: v.detach().cpu().double().numpy() for name, v in stats._asdict().items() if v is not None}
    lengths = np.diff(ends)
    columns = {"n_tokens": lengths}
    columns |= {name: _segment_sum(values, ends) for name, values in tokens.items()}
    if "dlogp" in tokens:
        columns |= _to_go_columns(tokens["entropy"], tokens["dlogp"], columns["entropy"], lengths, ends)
    return columns


def _to_go_columns(
    entropy: np.ndarray, dlogp: np.ndarray, sums: np.ndarray, lengths: np.ndarray, ends: np.ndarray
) -> dict[str, np.ndarray]:
    tokens_left = np.repeat(ends[1:], lengths) - 1.0 - np.arange(len(dlogp))
    length_to_go = _segment_sum(tokens_left * dlogp, ends)
    # What is left of the entropy is what is left of its deviation from the sequence's mean, plus that mean
    # for each token left. The running sum of the deviations returns to 0 at the end of every sequence, so one
    # sum over all tokens is exact to rounding within each.
    means = sums / np.maximum(lengths, 1)
    running = np.cumsum(entropy - np.repeat(means, lengths))
    at_end = np.repeat(running[ends[1:] - 1], lengths) if len(running) else running
    return {
        "entropy_dlogp": _segment_sum(entropy * dlogp, ends),
        "entropy_to_go": means * length_to_go + _segment_sum((at_end - running) * dlogp, ends),
        "length_to_go": length_to_go,
    }


def _segment_sum(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[S] sums of `values` [N] over the segments ends[i]:ends[i + 1]; those without elements give 0."""
    out = np.zeros(len(ends) - 1)
    filled = ends[1:] > ends[:-1]
    if filled.any():
        out[filled] = np.add.reduceat(values, ends[:-1][filled])
    return out
