"""From per-token values to the table with one row per rollout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dentropy.stats.checks import check_tensor, checked_cu_seqlens, checked_group
from dentropy.stats.dispatch import kernels_serve
from dentropy.stats.segments import segment_sum, sum_before
from dentropy.stats.tables import SequenceSums, TokenStats


def sequence_sums(stats: TokenStats, cu_seqlens, *, group=None) -> SequenceSums:
    """The columns of `SequenceSums`, summed over the tokens of each sequence in float64.

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

    On CUDA one kernel makes all columns, which are then copied to the host once.

    Example:
        >>> import torch
        >>> from dentropy import sequence_sums
        >>> from dentropy.stats.tables import TokenStats
        >>> stats = TokenStats(logp=torch.tensor([-1.0, -2.0, -3.0]), entropy=torch.tensor([1.0, 1.5, 2.0]))
        >>> sequence_sums(stats, [0, 2, 3]).logp.tolist()
        [-3.0, -3.0]
    """
    check_stats(stats)
    return _table(
        _kernel_columns if kernels_serve(stats.logp, float64=True) else _plain_columns, stats, cu_seqlens, group
    )


def plain_sequence_sums(stats: TokenStats, cu_seqlens, *, group=None) -> SequenceSums:
    """`sequence_sums` in NumPy whatever the device: the reference; the same arguments, results and errors."""
    check_stats(stats)
    return _table(_plain_columns, stats, cu_seqlens, group)


def _table(
    columns_of: Callable[[TokenStats, np.ndarray], dict[str, np.ndarray]], stats: TokenStats, cu_seqlens, group
) -> SequenceSums:
    ends = checked_cu_seqlens(cu_seqlens, len(stats.logp))
    sequences = len(ends) - 1
    group = checked_group(group, sequences)
    columns = columns_of(stats, ends)
    _raise_if_not_finite(columns, stats, ends)
    return SequenceSums(**columns, group=group, rollout=np.arange(sequences))


def _kernel_columns(stats: TokenStats, ends: np.ndarray) -> dict[str, np.ndarray]:
    from dentropy.kernels import sequence_sums as kernel  # Triton loads on first use

    columns = kernel.sequence_sums(*stats, cu_seqlens=torch.tensor(ends, device=stats.logp.device))
    return dict(zip(kernel.COLUMNS, columns.cpu().numpy()))


def _plain_columns(stats: TokenStats, ends: np.ndarray) -> dict[str, np.ndarray]:
    tokens = {
        name: value.detach().cpu().double().numpy() for name, value in stats._asdict().items() if value is not None
    }
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name afterwards
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


def check_stats(stats) -> None:
    """`stats` is a TokenStats of tensors of one length [N]; each order is there whole or not at all."""
    if not isinstance(stats, TokenStats):
        raise ValueError(f"stats is a {type(stats).__name__}, expected a TokenStats")
    for name, value in stats._asdict().items():
        if name == "logp":
            check_tensor("stats.logp", value, (None,), "[N], one value per token")
        elif name == "entropy" or value is not None:
            shape = list(stats.logp.shape)
            check_tensor(f"stats.{name}", value, tuple(shape), f"{shape} as stats.logp", device=stats.logp.device)
    for first, second in (("dlogp", "dentropy"), ("d2logp", "d2entropy")):
        if (getattr(stats, first) is None) != (getattr(stats, second) is None):
            raise ValueError(f"stats.{first} and stats.{second}: one is None, expected both or neither")
    if stats.d2logp is not None and stats.dlogp is None:
        raise ValueError("stats.dlogp is None, expected a tensor beside stats.d2logp")


def _raise_if_not_finite(columns: dict[str, np.ndarray], stats: TokenStats, ends: np.ndarray) -> None:
    """Looks at tokens only where a sum is not finite, which it is where any of its tokens is not."""
    for name, column in columns.items():
        bad = np.flatnonzero(~np.isfinite(column))
        if len(bad) == 0:
            continue
        rollout = int(bad[0])
        where = f"its sum over the tokens: {column[rollout]}"
        if name in stats._fields:
            values = getattr(stats, name)[ends[rollout] : ends[rollout + 1]].detach().cpu().double().numpy()
            tokens = np.flatnonzero(~np.isfinite(values))
            if len(tokens):
                where = f"token {tokens[0]}: {values[tokens[0]]}"
        raise ValueError(f"{name} of rollout {rollout} is not finite ({where})")
