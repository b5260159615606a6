"""Token statistics: the public functions, and which implementation serves a call."""

from __future__ import annotations

import torch
from torch import Tensor

from dentropy.stats import plain
from dentropy.stats.checks import check_logits
from dentropy.stats.dispatch import kernels_serve
from dentropy.stats.tables import TokenStats
from dentropy.stats.vocabulary_parallel import checked_linear


def token_stats(
    logits: Tensor,
    targets: Tensor,
    dlogits: Tensor | None = None,
    d2logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    validate: bool = False,
) -> TokenStats:
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
    if kernels_serve(logits, dlogits, d2logits):
        from dentropy.kernels.token_stats import token_stats as kernel  # Triton loads on first use

        return TokenStats(*kernel(logits, targets, dlogits, d2logits, temperature=temperature, softcap=softcap))
    return plain.stats_of_logits(logits, targets, dlogits, d2logits, temperature=temperature, softcap=softcap)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dhidden: Tensor | None = None,
    dweight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    process_group=None,
    validate: bool = False,
) -> TokenStats:
    """`token_stats` from hidden states and the head: logits = hidden · weightᵀ + bias, which are never stored.

    The derivative of the logits is dhidden · weightᵀ + hidden · dweightᵀ + dbias, where a tangent that is
    None is zero; with no tangent at all there are no derivatives. Logits are float32 (float64 where any input
    is float64), never rounded to half precision; whether products of float32 factors use TF32 is the caller's
    PyTorch setting (`torch.backends.cuda.matmul.fp32_precision`). Factors of different dtypes are multiplied as
    float32 ones, of which copies are made.

    Args:
        hidden: [N, D], float16, bfloat16, float32 or float64: the head's input.
        weight: [V, D], the head; V is the vocabulary.
        targets: [N], int32 or int64: the token of each row, in [0, V).
        dhidden: [N, D], derivative of `hidden`, or None.
        dweight: [V, D], derivative of `weight`, or None.
        bias: [V], or None.
        dbias: [V], derivative of `bias`, or None.
        temperature, softcap, validate: as in `token_stats`.
        process_group: a torch.distributed group over whose ranks the rows of the head are sharded, in the order of
            the ranks: weight, dweight, bias and dbias hold this rank's rows, their number may differ. Every rank
            calls with the same hidden, dhidden and targets (in the whole vocabulary) and with its part of the same
            tangents, and gets the same result. Where only some ranks' arguments are refused, the others hang until
            the group's timeout.

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
    targets, gather = checked_linear(
        hidden, weight, targets, dhidden, dweight, bias, dbias, temperature, softcap, process_group, validate
    )
    factors = [hidden, weight, dhidden, dweight]
    if not kernels_serve(*factors, bias, dbias):
        return plain.stats_of_hidden(
            hidden,
            weight,
            targets,
            dhidden,
            dweight,
            bias,
            dbias,
            temperature=temperature,
            softcap=softcap,
            gather=gather,
        )
    from dentropy.kernels.linear_token_stats import linear_token_stats as kernel

    if len({factor.dtype for factor in factors if factor is not None}) > 1:
        factors = [None if factor is None else factor.float() for factor in factors]
    hidden, weight, dhidden, dweight = factors
    allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TokenStats(
        *kernel(
            hidden,
            weight,
            targets,
            dhidden,
            dweight,
            bias=bias,
            dbias=dbias,
            temperature=temperature,
            softcap=softcap,
            allow_tf32=allow_tf32,
            gather=gather,
        )
    )
