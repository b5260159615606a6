"""Token statistics: the public functions, and which implementation serves a call."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dentropy import reference
from dentropy.checks import check_linear, check_logits
from dentropy.tables import TokenStats


def token_stats(logits: Tensor, targets: Tensor, dlogits: Tensor | None = None,
                d2logits: Tensor | None = None, *, temperature: float = 1.0, softcap: float | None = None,
                validate: bool = False) -> TokenStats:
    """Log-probability and entropy of every token, and their derivatives along a direction, in one pass.

    The formulas are those of `TokenStats`, with z = softcap · tanh(logits / softcap) / temperature (without a
    softcap: z = logits / temperature) and ż, z̈ its derivatives; the chain rule through both is done here.

    Args:
        logits: [N, V], float16, bfloat16, float32 or float64, any strides: raw logits, before softcap and
            temperature. A logit of −inf is a token outside the vocabulary: it contributes nothing, whatever
            its derivatives are.
        targets: [N], int32 or int64: the token of each row, in [0, V).
        dlogits: [N, V], first derivative of `logits`; its dtype may be another one. None: no derivatives.
        d2logits: [N, V], second derivative of `logits`; needs `dlogits`. None: no second derivatives.
        temperature: what the sampler divided by.
        softcap: cap of the logits, applied before the temperature, or None.
        validate: check the values of `targets` on every device; on CUDA this synchronizes.

    Returns:
        TokenStats of [N] tensors, float32 (float64 where any input is float64), computed in that precision
        throughout, without autograd; fields that were not asked for are None. A target whose logit is −inf
        has logp −inf; a row of −inf alone is NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, on every device; a target outside [0, V), on
            the CPU or with `validate`. On CUDA without `validate` such a row is NaN, and nothing out of
            bounds is read.

    Example:
        >>> import torch
        >>> from dentropy import token_stats
        >>> logits, dlogits = torch.zeros(1, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> stats = token_stats(logits, torch.tensor([0]), dlogits)
        >>> round(stats.entropy.item(), 4), stats.dlogp.item()
        (1.3863, 0.75)
    """
    check_logits(logits, targets, dlogits, d2logits, temperature, softcap, validate)
    if d2logits is None and _kernels_serve(logits, dlogits):
        return _kernel_stats(logits, targets, dlogits, temperature=temperature, softcap=softcap)
    return reference.stats_of_logits(logits, targets, dlogits, d2logits,
                                     temperature=temperature, softcap=softcap)


def linear_token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, dhidden: Tensor | None = None,
                       dweight: Tensor | None = None, *, bias: Tensor | None = None,
                       dbias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None,
                       validate: bool = False) -> TokenStats:
    """`token_stats` from hidden states and the head: logits = hidden · weightᵀ + bias, a few rows at a time.

    The derivative of the logits is dhidden · weightᵀ + hidden · dweightᵀ + dbias, where a tangent that is
    None is zero; with no tangent at all there are no derivatives. Logits are float32 (float64 where any input
    is float64), never rounded to half precision; whether products of float32 factors use TF32 is the caller's
    PyTorch setting.

    Args:
        hidden: [N, D], float16, bfloat16, float32 or float64: the head's input.
        weight: [V, D], the head; V is the vocabulary.
        targets: [N], int32 or int64: the token of each row, in [0, V).
        dhidden: [N, D], derivative of `hidden`, or None.
        dweight: [V, D], derivative of `weight`, or None.
        bias: [V], or None.
        dbias: [V], derivative of `bias`, or None.
        temperature, softcap, validate: as in `token_stats`.

    Returns:
        TokenStats of [N] tensors, up to first order; float32, or float64 where any input is.

    Raises:
        ValueError: as `token_stats`.

    Example:
        >>> import torch
        >>> from dentropy import linear_token_stats
        >>> hidden, weight = torch.zeros(1, 2), torch.randn(4, 2)
        >>> stats = linear_token_stats(hidden, weight, torch.tensor([0]))
        >>> round(stats.entropy.item(), 4), stats.dlogp
        (1.3863, None)
    """
    check_linear(hidden, weight, targets, dhidden, dweight, bias, dbias, temperature, softcap, validate)
    kernels = _kernels_serve(hidden, weight, dhidden, dweight, bias, dbias)
    return reference.stats_of_hidden(_kernel_stats if kernels else reference.stats_of_logits,
                                     hidden, weight, targets, dhidden, dweight, bias, dbias,
                                     temperature=temperature, softcap=softcap)


def _kernels_serve(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels take these: no float64, on CUDA or, under Triton's interpreter, the CPU."""
    given = [tensor for tensor in tensors if tensor is not None]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = given[0].is_cuda or (given[0].is_cpu and interpreted)
    return device and reference.working_dtype(*given) == torch.float32 and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def _kernel_stats(logits: Tensor, targets: Tensor, dlogits: Tensor | None = None, *, temperature: float,
                  softcap: float | None) -> TokenStats:
    from dentropy.kernels.token_stats import token_stats as kernel  # Triton loads on first use

    return TokenStats(*kernel(logits, targets, dlogits, temperature=temperature, softcap=softcap))
