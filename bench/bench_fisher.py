"""What `fisher` costs at first order on a CPU: dentropy's token statistics beside the same loop without that one sum.

    pytest bench/bench_fisher.py --benchmark-json=run.json && python bench/report.py run.json

float32 logits and derivatives, a vocabulary of 50,257. What it costs in the kernels, in instructions, is in
results/compiled_kernels.md.
"""

from unittest.mock import patch

import pytest
import torch
from formulas import truth_of
from interleaved import Provider, compare, largest_error, name_of

from dentropy import token_stats
from dentropy.stats import plain

SHAPE = (32, 50257)
FLOAT32 = 5e-5


def moments_without_fisher(out, u, du, *, buffers, scale):
    """The first order of `plain._write_moments`, for finite logits, without Σ mass · du²."""
    x, centred, mass, product = buffers
    top, total, mean_x, base, rest, covariance, _ = out
    torch.amax(u, 1, keepdim=True, out=top)
    torch.sub(u, top, out=x).mul_(scale / plain.LOG_2)
    torch.exp2(x, out=mass)

    def moment(factor, out):
        return torch.sum(torch.mul(mass, factor, out=product), 1, keepdim=True, out=out)

    torch.sum(mass, 1, keepdim=True, out=total)
    assert not moment(x, mean_x).isnan().any()
    inverse = total.masked_fill(total == 0.0, 1.0).reciprocal_()
    x.sub_(mean_x.mul_(inverse))
    moment(du, base).mul_(inverse)
    moment(torch.sub(du, base, out=centred), rest).mul_(inverse)
    torch.sum(x.mul_(product), 1, keepdim=True, out=covariance)


def with_fisher(*inputs):
    return token_stats(*inputs)


def without_fisher(*inputs):
    with patch.object(plain, "_write_moments", moments_without_fisher):
        return token_stats(*inputs)


@pytest.mark.parametrize("rows, vocabulary", [SHAPE])
def test_fisher(benchmark, rows, vocabulary):
    torch.manual_seed(0)
    logits, derivative = torch.randn(2, rows, vocabulary)
    inputs = (logits.mul_(2), torch.randint(vocabulary, (rows,)), derivative)
    truth = truth_of(*inputs)
    compare(
        benchmark,
        f"Token statistics with and without fisher, first order, [{rows}, {vocabulary}] {name_of(logits.dtype, 'cpu')}",
        {"dentropy": Provider(with_fisher, FLOAT32), "dentropy, without fisher": Provider(without_fisher, FLOAT32)},
        inputs,
        lambda found: largest_error(found[:4], truth[:4]),
        device="cpu",
        work=2 * logits.nbytes,
        unit="GB/s",
        reference="dentropy, without fisher",
        rounds=40,
    )
