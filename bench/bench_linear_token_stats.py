"""Token statistics from hidden states and the head: dentropy beside chunks of logits and fused kernels.

    pytest bench/bench_linear_token_stats.py --benchmark-json=run.json && python bench/report.py run.json

bfloat16 at N 8192, V 151936, D 4096 and 1536 and float32 at D 1536 with a GPU; small and float32 on a CPU.
Nothing moves (one product of matrices), the hidden states move (two), or the head moves too (three). The rate
counts these products, and "the products alone" are they, by cuBLAS or the CPU's library, written in the
inputs' dtype. Chunks are of CHUNK rows. Peers that give less say so in their names. How providers are timed
and checked: see `interleaved`.
"""

import pytest
import torch
from formulas import closed_form, forward_mode, gate_rows
from interleaved import Provider, compare, largest_error, name_of
from torch.func import jvp

from dentropy import linear_token_stats, reference, token_stats

CASES = (
    ("cpu", torch.float32, 512, 32768, 256),
    ("cuda", torch.bfloat16, 8192, 151936, 4096),
    ("cuda", torch.bfloat16, 8192, 151936, 1536),
    ("cuda", torch.float32, 8192, 151936, 1536),
)
MOVES = ("nothing moves", "hidden states move", "hidden states and head move")
CHUNK = 2048  # rows; at V = 151,936 their float32 logits take 1.2 GB
FLOAT32, ROUNDED = 5e-5, 5e-2  # tolerances: float32 logits; logits rounded to bfloat16 on the way


def dentropy(hidden, weight, targets, *tangents):
    return [x for x in linear_token_stats(hidden, weight, targets, *tangents) if x is not None]


def product(a, b):
    """a · bᵀ in float32, by tensor cores where the factors are half precision."""
    return a @ b.T if a.dtype == torch.float32 else torch.mm(a, b.T, out_dtype=torch.float32)


def through_logits(stats_of):
    """Chunks of float32 logits and their derivative, each handed to `stats_of`."""

    def provider(hidden, weight, targets, dhidden=None, dweight=None):
        parts = []
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            derivative = [] if dhidden is None else [product(dhidden[rows], weight)]
            if dweight is not None:
                derivative[0] += product(hidden[rows], dweight)
            parts.append(stats_of(product(hidden[rows], weight), targets[rows], *derivative))
        return [torch.cat(column) for column in zip(*parts) if column[0] is not None]

    return provider


def jvp_in_chunks(hidden, weight, targets, dhidden, dweight=None):
    """torch.func.jvp from hidden states to statistics; logits are rounded to the inputs' dtype."""
    parts = []
    for h, dh, y in zip(hidden.split(CHUNK), dhidden.split(CHUNK), targets.split(CHUNK)):
        primals, tangents = ((h,), (dh,)) if dweight is None else ((h, weight), (dh, dweight))

        def stats_of(h, w=weight):
            return forward_mode(h @ w.T, y)  # noqa: B023

        values, derivatives = jvp(stats_of, primals, tangents)
        parts.append((*values, *derivatives))
    return [torch.cat(column) for column in zip(*parts)]


def liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return [-liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")]


def cut_cross_entropy(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return [-linear_cross_entropy(hidden, weight, targets, reduction="none")]


def verl(hidden, weight, targets):
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, 1.0, "none", None)


def products_alone(hidden, weight, targets, dhidden=None, dweight=None):
    out = torch.empty(min(CHUNK, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)
    factors = [(hidden, weight), (dhidden, weight), (hidden, dweight)]
    for a, b in factors[: 1 + (dhidden is not None) + (dweight is not None)]:
        for chunk in a.split(CHUNK):
            torch.mm(chunk, b.T, out=out[: len(chunk)])


def providers_of(moves, dtype):
    rounded = FLOAT32 if dtype == torch.float32 else ROUNDED
    providers = {
        "dentropy": Provider(dentropy, FLOAT32),
        "float32 logits in chunks, token_stats": Provider(through_logits(token_stats), FLOAT32),
        "float32 logits in chunks, PyTorch": Provider(through_logits(closed_form), FLOAT32),
    }
    if moves == 0:
        providers |= {
            "Liger fused linear cross-entropy (logp)": Provider(liger, rounded, "liger_kernel", cuda=True),
            "cut-cross-entropy (logp)": Provider(cut_cross_entropy, rounded, "cut_cross_entropy", cuda=True),
            "verl linear cross-entropy (logp, entropy)": Provider(verl, rounded, "verl", cuda=True),
        }
    else:
        providers["torch.func.jvp in chunks"] = Provider(jvp_in_chunks, rounded)
    return providers | {"the products alone": Provider(products_alone)}


def truth_of(hidden, weight, targets, *tangents):
    """The rows that are checked, and their fields in float64 from the same rounded inputs."""
    rows = gate_rows(len(hidden)).to(hidden.device)
    dhidden, dweight = (*tangents, None, None)[:2]
    stats = reference.linear_token_stats(
        hidden[rows].double(), weight, targets[rows], None if dhidden is None else dhidden[rows], dweight
    )
    return rows, [field for field in stats if field is not None]


@pytest.mark.parametrize("moves", range(3), ids=MOVES)
@pytest.mark.parametrize("device, dtype, rows, vocabulary, depth", CASES)
def test_linear_token_stats(benchmark, device, dtype, rows, vocabulary, depth, moves):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    hidden, dhidden = torch.randn(2, rows, depth, device=device).to(dtype)
    weight = torch.randn(vocabulary, depth, device=device).mul_(2 * depth**-0.5).to(dtype)
    dweight = torch.randn(vocabulary, depth, device=device).mul_(depth**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,), device=device)
    inputs = (hidden, weight, targets, *(dhidden, dweight)[:moves])
    checked, truth = truth_of(*inputs)
    compare(
        benchmark,
        f"Token statistics from hidden states, {MOVES[moves]}, N {rows}, V {vocabulary}, "
        f"D {depth}, {name_of(dtype, device)}",
        providers_of(moves, dtype),
        inputs,
        lambda output: largest_error([x[checked] for x in output], truth),
        device=device,
        work=2 * rows * vocabulary * depth * (1 + moves),
        unit="TFLOP/s",
        reference="the products alone",
        headline=moves == 2 and depth != 1536,
    )
