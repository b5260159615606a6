"""Packed causal attention with tangents, as an attention function that Hugging Face models call.

A packed row holds several sequences one after the other; `cu_seq_lens_q` says where each begins. If the query, key,
value or sink carries a forward-mode tangent, the output does too. The arithmetic is in `attention_ops`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from dentropy.model.attention_ops import attention, attention_with_tangent, plain_attention

NAME, CHECKED, NESTABLE = "dentropy", "dentropy_checked", "dentropy_nestable"


@cache
def register(name: str = NAME) -> str:
    """Makes a function known to transformers; returns the name to give as `attn_implementation`.

    "dentropy" carries the tangents of dual tensors; "dentropy_nestable" is plain PyTorch arithmetic, for torch.func's
    transforms, which wrap tensors their own way and nest. Causality and sliding windows are built here, and where no
    function for masks is registered transformers makes none: to make one it reads positions back from the device.
    "dentropy_checked", for a policy's first rows, is "dentropy" that asks for the local size of the mask a model would
    make, to refuse those that mean more (see `_check_mask`).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, nestable_attention_forward if name == NESTABLE else attention_forward)
    if name == CHECKED:
        AttentionMaskInterface.register(name, _local_size)
    return name


# The operators have no reverse mode to run, only one to trace.
_transposing: ContextVar[bool] = ContextVar("_transposing", default=False)


@contextmanager
def transposing() -> Iterator[None]:
    """Inside, `attention_forward` leaves operators in a traced graph, gradients or not."""
    token = _transposing.set(True)
    try:
        yield
    finally:
        _transposing.reset(token)


class UnseenMask(ValueError):
    """A model masks in a way that `sliding_window` does not tell its attention function."""


def _local_size(*_args, local_size=None, **_kwargs) -> Tensor | None:
    """Stands for a mask: the size of the window or chunk it would cut out, None for plain causality."""
    return None if local_size is None else torch.tensor(local_size)


def _check_mask(mask: Tensor | None, sliding_window: int | None) -> None:
    if mask is not None and (mask.ndim != 0 or int(mask) != sliding_window):
        raise UnseenMask("attention_mask: more than causality and sliding_window say, expected no more")


def attention_forward(module, query, key, value, attention_mask=None, *, s_aux=None, **settings) -> tuple[Tensor, None]:
    """The signature transformers expects of an attention function.

    query [B, H, S, D]; key [B, Hkv, S, D] and value [B, Hkv, S, Dv] with H a multiple of Hkv; s_aux [H] (sinks);
    cu_seq_lens_q [sequences + 1] and max_length_q for a packed row (B = 1), or None where every row is one sequence.
    Returns ([B, S, H, Dv], None); the output is a dual tensor where any input is.
    """
    if has_torch_function((query, key, value)):  # a mode around the model has nothing to say of what is inside
        more = settings | {"attention_mask": attention_mask, "s_aux": s_aux}
        return handle_torch_function(attention_forward, (query, key, value), module, query, key, value, **more)
    _check_mask(attention_mask, settings.get("sliding_window"))
    duals = [forward_ad.unpack_dual(x) if x is not None else (None, None) for x in (query, key, value, s_aux)]
    (*primals, sinks), (*tangents, dsinks) = zip(*duals, strict=True)
    primals, tangents = [_packed(x) for x in primals], [x if x is None else _packed(x) for x in tangents]
    bounds, longest, form = _settings(query, key, **settings)
    moves = dsinks is not None or any(t is not None for t in tangents)
    form["sinks"] = sinks
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*primals, sinks))
    if differentiated and not _transposing.get():
        out, dout = plain_attention(primals, tangents if moves else None, bounds, **form, dsinks=dsinks)
    elif moves:
        out, dout = attention_with_tangent(primals, tangents, bounds, longest, **form, dsinks=dsinks)
    else:
        out, dout = attention(*primals, bounds, longest, **form)[0], None
    out = _rows(out, query)
    return out if dout is None else forward_ad.make_dual(out, _rows(dout, query)), None


def nestable_attention_forward(
    module, query, key, value, attention_mask=None, *, s_aux=None, **settings
) -> tuple[Tensor, None]:
    """`attention_forward` without a rule of its own for tangents."""
    _check_mask(attention_mask, settings.get("sliding_window"))
    bounds, _, form = _settings(query, key, **settings)
    out, _ = plain_attention([_packed(x) for x in (query, key, value)], None, bounds, **form, sinks=s_aux)
    return _rows(out, query), None


def _settings(
    query: Tensor,
    key: Tensor,
    *,
    scaling=None,
    sliding_window=None,
    softcap=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    **_unused,
) -> tuple[Tensor, int, dict]:
    """Where sequences begin [sequences + 1], the length of the longest or more, and the scores' settings."""
    batch, heads, length, size = query.shape
    if heads % key.shape[1]:
        raise ValueError(f"key: {key.shape[1]} heads, expected a number that divides the query's {heads}")
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    form = dict(scaling=size**-0.5 if scaling is None else scaling, window=sliding_window, softcap=softcap)
    return cu_seq_lens_q, length if max_length_q is None else max_length_q, form


def _packed(x: Tensor) -> Tensor:
    """[B, heads, S, D] -> [B · S, heads, D]."""
    return x.transpose(1, 2).flatten(0, 1)


def _rows(x: Tensor, query: Tensor) -> Tensor:
    """[B · S, heads, D] -> [B, S, heads, D]."""
    return x.unflatten(0, (query.shape[0], query.shape[2]))
