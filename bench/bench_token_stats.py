"""Token statistics from logits at every order: dentropy beside PyTorch and beside fused kernels.

    pytest bench/bench_token_stats.py --benchmark-json=run.json && python bench/report.py run.json

float32 at [1024, 50257] on a CPU; with a GPU bfloat16 at [8192, 151936] and [512, 151936]. The rate counts
the bytes that the statistics must read: logits and each of their derivatives, once. It stands beside that of
a device copy in the same rounds, which reads and writes the logits. How providers are timed and checked: see
`interleaved`.
"""

import pytest
import torch
from formulas import closed_form, forward_mode, gate_rows, truth_of
from interleaved import Provider, compare, largest_error, name_of

from dentropy import token_stats

ORDERS = ("primal", "first order", "second order")
CASES = (("cpu", 1024, 50257), ("cuda", 8192, 151936), ("cuda", 512, 151936))
FLOAT32, ROUNDED = 5e-5, 2e-2  # tolerances: float32 throughout; results rounded to the logits' bfloat16


def dentropy(logits, targets, *derivatives):
    return [x for x in token_stats(logits, targets, *derivatives) if x is not None]


def liger(logits, targets):
    """−logp; its kernel overwrites only logits that require a gradient."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return [-liger_cross_entropy(logits, targets, reduction="none")]


def flash_attn(logits, targets):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return [-cross_entropy_loss(logits, targets)[0]]


def quack(logits, targets):
    from quack.cross_entropy import cross_entropy_fwd

    return [-cross_entropy_fwd(logits, targets)]


def providers_of(order, logits):
    torch.compiler.reset()  # one case's compiled form does not count against the limit of the next one's
    providers = {
        "dentropy": Provider(dentropy, FLOAT32),
        "torch.compile, closed form": Provider(torch.compile(closed_form, dynamic=False), FLOAT32),
        "PyTorch, closed form": Provider(closed_form, FLOAT32),
    }
    if order == 0:
        providers |= {
            "Liger cross-entropy (logp)": Provider(liger, ROUNDED, "liger_kernel", cuda=True),
            "flash-attn cross-entropy (logp)": Provider(flash_attn, FLOAT32, "flash_attn", cuda=True),
            "quack cross-entropy (logp)": Provider(quack, FLOAT32, "quack", cuda=True),
        }
    else:
        providers["torch.func.jvp"] = Provider(forward_mode, FLOAT32)
    copy = torch.empty_like(logits)
    return providers | {"device copy": Provider(lambda *_: copy.copy_(logits), work=2 * logits.nbytes)}


@pytest.mark.parametrize("order", range(3), ids=ORDERS)
@pytest.mark.parametrize("device, rows, vocabulary", CASES)
def test_token_stats(benchmark, device, rows, vocabulary, order):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary, dtype=dtype, device=device).mul_(2)
    targets = torch.randint(vocabulary, (rows,), device=device)
    derivatives = [torch.randn_like(logits) for _ in range(order)]
    checked = gate_rows(rows).to(device)
    truth = truth_of(*(x[checked] for x in (logits, targets, *derivatives)))
    compare(
        benchmark,
        f"Token statistics from logits, {ORDERS[order]}, [{rows}, {vocabulary}] {name_of(dtype, device)}",
        providers_of(order, logits),
        (logits, targets, *derivatives),
        lambda output: largest_error([x[checked] for x in output], truth),
        device=device,
        work=(1 + order) * logits.nbytes,
        unit="GB/s",
        reference="device copy",
        headline=order == 1 and rows != 512,
    )
