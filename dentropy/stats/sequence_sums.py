"""From per-token values to the table with one row per rollout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dentropy.stats.checks import check_stats, check_sums, checked_cu_seqlens, checked_group
from dentropy.stats.dispatch import kernels_serve
from dentropy.stats.segments import pieces, segment_sum, sum_before
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
    return dict(zip(kernel.columns_of(*stats), columns.cpu().numpy(), strict=True))


def plain_columns(stats: TokenStats, ends: np.ndarray) -> dict[str, np.ndarray]:
    """The columns in NumPy, whatever the device."""
    parts = []
    for rows in pieces(ends):
        first, last = ends[rows.start], ends[rows.stop]
        part = TokenStats(*(None if x is None else x[first:last] for x in stats))
        parts.append(_columns_of_piece(part, ends[rows.start : rows.stop + 1] - first))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _columns_of_piece(stats: TokenStats, ends: np.ndarray) -> dict[str, np.ndarray]:
    tokens = {name: v.detach().cpu().double().numpy() for name, v in stats._asdict().items() if v is not None}
    columns = {"n_tokens": np.diff(ends)}
    columns |= {name: segment_sum(values, ends) for name, values in tokens.items()}
    if "dlogp" in tokens:
        columns |= {name: segment_sum(values, ends) for name, values in _prefix_products(tokens, ends).items()}
    return columns


def _prefix_products(tokens: dict[str, np.ndarray], ends: np.ndarray) -> dict[str, np.ndarray]:
    """What the columns that look at pairs of tokens are the sums of, [N] each.

    The weight of token j, the ratio of the probabilities of what comes before it, has the first derivative
    A_j = Σ_{k<j} dlogp_k and the second A_j² + Σ_{k<j} d2logp_k.
    """
    entropy, dlogp = tokens["entropy"], tokens["dlogp"]
    first = sum_before(dlogp, ends)
    tokens_left = np.repeat(ends[1:], np.diff(ends)) - 1.0 - np.arange(len(dlogp))
    products = {
        "entropy_dlogp": entropy * dlogp,
        "entropy_to_go": entropy * first,
        "length_to_go": tokens_left * dlogp,  # Σ_j A_j, without the roundings of a running sum
    }
    if "d2logp" in tokens:
        second = first**2 + sum_before(tokens["d2logp"], ends)
        products |= {
            "dentropy_to_go": tokens["dentropy"] * first,
            "entropy_to_go_2": entropy * second,
            "length_to_go_2": second,
        }
    return products
