"""Packed causal attention: its output and log-sum-exp.

    s_ij = scaling · q_i · k_j,  softcap · tanh(s / softcap) with a softcap,   o_i = Σ_j exp(s_ij − lse_i) v_j

Which keys a query sees and how a program walks them is said in `packing`; the online softmax is float32. A sink is
one more logit of a head, without a value.
"""

import torch
import triton
import triton.language as tl

from .configurations import ATTENTION, attention_blocks, options
from .moments import BITS
from .packing import grid, key_blocks, last_contiguous, load_tile, query_block, seen, sizes, store_tile, strided
from .products import dot
from .softcap import softcapped


@triton.jit
def _attend(
    state,
    q,
    queries,
    source,
    low,
    high,
    scaling,
    softcap,
    window,
    SIZE: tl.constexpr,
    SIZE_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online softmax over keys low, ..., high − 1: top (in units of log 2), total, and Σ exp(s) v."""
    top, total, acc = state
    K, V, head, start, length = source
    for n in range(low, high, BLOCK_N):
        k = load_tile(K, head, start, n, length, BLOCK_N, SIZE, PADDED, MASKED)
        s = dot(q, k.T, tl.zeros([q.shape[0], BLOCK_N], tl.float32), "ieee")
        if softcap is not None:
            s = softcapped(s, s, s, scaling / softcap)[0] * (softcap * BITS)
        else:
            s *= scaling * BITS
        if MASKED:
            s = tl.where(seen(queries, n + tl.arange(0, BLOCK_N), window), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A query that has seen nothing yet: without the guard −inf − (−inf) would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        p = tl.exp2(s - base[:, None])
        rescale = tl.exp2(top - base)
        top = new_top
        total = total * rescale + tl.sum(p, 1)
        v = load_tile(V, head, start, n, length, BLOCK_N, SIZE_V, PADDED_V, MASKED)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None], "ieee")
    return top, total, acc


@triton.jit(do_not_specialize=["S", "tokens", "window"])
def _attention_kernel(
    Q,
    K,
    V,
    Out,  # (pointer, row stride, head stride) of [tokens, H or Hkv, D or Dv]
    Lse,  # [H, tokens] float32
    Sinks,  # [H], or None
    CuSeqlens,  # [S + 1]
    S,
    tokens,
    H,
    Hkv,
    scaling,
    softcap,
    window,  # softcap, window: numbers or None
    SIZE: tl.constexpr,
    SIZE_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, start, length, first = query_block(CuSeqlens, S, H, BLOCK_M)
    if first < length:
        low, whole, end = key_blocks(first, length, window, BLOCK_M, BLOCK_N)
        queries = first + tl.arange(0, BLOCK_M)
        q = load_tile(Q, head, start, first, length, BLOCK_M, SIZE, PADDED, True)
        source = (K, V, head // (H // Hkv), start, length)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if Sinks is not None:
            top = tl.zeros([BLOCK_M], tl.float32) + tl.load(Sinks + head).to(tl.float32) * BITS
            total += 1.0
        state = top, total, tl.zeros([BLOCK_M, PADDED_V], tl.float32)
        # In this order: masks in the first loop keep ptxas from overlapping its products.
        state = _attend(
            state,
            q,
            queries,
            source,
            whole,
            first,
            scaling,
            softcap,
            window,
            SIZE,
            SIZE_V,
            PADDED,
            PADDED_V,
            BLOCK_N,
            False,
        )
        if window is not None:
            state = _attend(
                state,
                q,
                queries,
                source,
                low,
                whole,
                scaling,
                softcap,
                window,
                SIZE,
                SIZE_V,
                PADDED,
                PADDED_V,
                BLOCK_N,
                True,
            )
        state = _attend(
            state,
            q,
            queries,
            source,
            first,
            end,
            scaling,
            softcap,
            window,
            SIZE,
            SIZE_V,
            PADDED,
            PADDED_V,
            BLOCK_N,
            True,
        )
        top, total, acc = state
        lse = (top + tl.log2(total)) / BITS
        tl.store(Lse + head.to(tl.int64) * tokens + start + queries, lse, mask=queries < length)
        store_tile(Out, acc / total[:, None], head, start, first, length, BLOCK_M, SIZE_V, PADDED_V)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [tokens, H, Dv] in the dtype of q, and log-sum-exp [H, tokens] in float32, in nats, with softcap
    and sink included.

    q [tokens, H, D], k [tokens, Hkv, D], v [tokens, Hkv, Dv]: float16, bfloat16 or float32, all of one dtype,
    any strides; D and Dv up to 256, ValueError beyond; H a multiple of Hkv, and head h uses key head
    h // (H // Hkv). cu_seqlens [S + 1], int32 or int64, contiguous, from 0 to tokens; max_length, the longest
    sequence's length or more; sinks [H], any floating dtype. Nothing else is checked, nothing synchronizes.

    PyTorch's packed flash attention does it where it can, the kernel above everything else.
    """
    if _flash_attention_serves(q, v, cu_seqlens, softcap, sinks):
        cu_seqlens = cu_seqlens.to(torch.int32)
        # Its window counts the keys before the query's own. PyTorch 2.11 and 2.13 both take these arguments;
        # varlen_attn, which does the same, wants enable_gqa in 2.13 and does not know it in 2.11.
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            last_contiguous(q),
            last_contiguous(k),
            last_contiguous(v),
            cu_seqlens,
            cu_seqlens,
            max_length,
            max_length,
            dropout_p=0.0,
            is_causal=window is None,
            return_debug_mask=False,
            scale=scaling,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=0,
        )
        return out, lse
    return packed_attention(q, k, v, cu_seqlens, scaling=scaling, window=window, softcap=softcap, sinks=sinks)


def _flash_attention_serves(q, v, cu_seqlens, softcap, sinks) -> bool:
    return (
        q.is_cuda
        and torch.backends.cuda.is_flash_attention_available()
        and softcap is None
        and sinks is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and len(q) > 0
        and q.shape[-1] == v.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
        and len(cu_seqlens) - 1 <= 65535  # its grid's second dimension counts sequences
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def packed_attention(q, k, v, cu_seqlens, *, scaling, window=None, softcap=None, sinks=None):
    """`attention` by the kernel of this file."""
    tokens, H, _ = q.shape
    out = torch.empty(tokens, H, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(H, tokens, dtype=torch.float32, device=q.device)
    blocks = attention_blocks(ATTENTION, q, v)
    with torch.cuda.device_of(q):
        _attention_kernel[grid(q, cu_seqlens, blocks.queries)](
            *(strided(x) for x in (q, k, v, out)),
            lse,
            last_contiguous(sinks),
            cu_seqlens,
            len(cu_seqlens) - 1,
            tokens,
            H,
            k.shape[1],
            scaling,
            softcap,
            window,
            **sizes(q, v),
            BLOCK_M=blocks.queries,
            BLOCK_N=blocks.keys,
            **options(blocks.num_warps, blocks.num_stages),
        )
    return out, lse
