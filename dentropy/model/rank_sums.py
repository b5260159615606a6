"""Sums over the ranks that hold parts of one product, in forward and in reverse mode.

`all_reduce` by itself adds the primals of dual tensors and leaves their tangents as they are, or drops them, and has no
gradient, all without a word.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def summed(x: Tensor, group) -> Tensor:
    """The sum of the ranks' `x`, with the sum of their tangents. Each rank gets the gradient of the sum."""
    return _Summed.apply(x, group)


def shared(x: Tensor, group) -> Tensor:
    """`x`, the same on every rank, of which each goes on to make its part of something: its gradient is the sum of
    theirs."""
    return _Shared.apply(x, group)


def _over_ranks(x: Tensor, group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _over_ranks(x, group)

    @staticmethod
    def jvp(ctx, dx, _):
        return _over_ranks(dx, ctx.group)

    @staticmethod
    def backward(ctx, upstream):
        return upstream, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def jvp(ctx, dx, _):
        return dx.view_as(dx)

    @staticmethod
    def backward(ctx, upstream):
        return _over_ranks(upstream, ctx.group), None
