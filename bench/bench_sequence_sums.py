"""Per-sequence sums, first order: dentropy beside its NumPy path and beside plain PyTorch.

    pytest bench/bench_sequence_sums.py --benchmark-json=run.json && python bench/report.py run.json

Many short sequences, some thousands of middling ones and a few very long ones, float32; on a CPU in smaller numbers.
The rate counts the bytes that must be read and written, beside that of a device copy of the values. "dentropy" is the
public function, which ends with the table on the host, as do the rest but for the kernel alone. Errors are those of
the last two sequences. How providers are timed and checked: see `interleaved`.
"""

import numpy as np
import pytest
import torch
from interleaved import Provider, compare, name_of

from dentropy import TokenStats, reference, sequence_sums
from dentropy.stats.sequence_sums import plain_columns, table_of

CASES = (  # device, name, sequences and the range of their lengths
    ("cpu", "short", 100_000, 0, 20),
    ("cpu", "middling", 1_000, 500, 1_500),
    ("cpu", "long", 4, 80_000, 100_000),
    ("cuda", "short", 1_000_000, 0, 20),
    ("cuda", "middling", 8_192, 500, 1_500),
    ("cuda", "long", 16, 80_000, 100_000),
)
TOLERANCE = 1e-9
NAMES = ("n_tokens", "logp", "entropy", "dlogp", "dentropy", "entropy_dlogp", "entropy_to_go", "length_to_go")


def dentropy(stats, ends):
    return sequence_sums(stats, ends).columns()


def numpy(stats, ends):
    return table_of(plain_columns, stats, ends, None).columns()


def plain_pytorch(stats, ends):
    """Segment sums by index_add_, what is left by a running sum; float64, on the device of `stats`."""
    lengths = ends.diff()
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=ends.device), lengths, output_size=len(stats.logp)
    )

    def total(values):
        out = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
        return out.index_add_(0, sequence, values)

    logp, entropy, dlogp, dentropy = (value.double() for value in stats[:4])
    running = entropy.cumsum(0)
    at_end = torch.cat([running.new_zeros(1), running])[ends[1:]]
    tokens_left = ends[1:][sequence] - 1 - torch.arange(len(logp), device=ends.device)
    columns = (
        lengths.double(),
        total(logp),
        total(entropy),
        total(dlogp),
        total(dentropy),
        total(entropy * dlogp),
        total((at_end[sequence] - running) * dlogp),
        total(tokens_left * dlogp),
    )
    return dict(zip(NAMES, torch.stack(columns).cpu().numpy()))


def kernel(stats, ends):
    from dentropy.kernels import sequence_sums

    return dict(zip(NAMES, sequence_sums.sequence_sums(*stats, cu_seqlens=ends)))


def make_inputs(sequences, shortest, longest, device):
    torch.manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (sequences,))
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logp, entropy, dlogp, dentropy = torch.randn(4, int(ends[-1]), device=device)
    return TokenStats(-logp.abs(), entropy.abs(), dlogp, dentropy), ends.to(device)


def truth_of(stats, ends):
    """The columns of the last two sequences, and the sizes of the terms that they are sums of."""
    ends = ends.tolist()
    last = TokenStats(*(value[ends[-3] :] for value in stats[:4]))
    return [
        reference.sequence_sums(values, np.array(ends[-3:]) - ends[-3])
        for values in (last, TokenStats(*map(torch.abs, last[:4])))
    ]


def largest_error(columns, truth, sizes) -> float:
    """Of the last sequences, over the size of the terms (products of the tokens' values)."""
    errors = []
    for name in NAMES:
        got = np.array([float(value) for value in columns[name][-2:]])
        errors.append(np.abs(got - getattr(truth, name)) / np.maximum(getattr(sizes, name), 1e-300))
    return float(np.max(errors))


@pytest.mark.parametrize("device, case, sequences, shortest, longest", CASES)
def test_sequence_sums(benchmark, device, case, sequences, shortest, longest):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    stats, ends = make_inputs(sequences, shortest, longest, device)
    truth = truth_of(stats, ends)
    read = 4 * stats.logp.nbytes + ends.nbytes
    copy = torch.empty(4, len(stats.logp), device=device)
    source = torch.stack(stats[:4])
    providers = {
        "dentropy": Provider(dentropy, TOLERANCE),
        "dentropy, columns left on the GPU": Provider(kernel, TOLERANCE, cuda=True),
        "NumPy": Provider(numpy, TOLERANCE),
        "plain PyTorch": Provider(plain_pytorch, TOLERANCE),
        "device copy": Provider(lambda *_: copy.copy_(source), work=2 * source.nbytes),
    }
    compare(
        benchmark,
        f"Sums, first order, {sequences} {case} sequences of {shortest} to {longest} tokens, "
        f"{name_of(torch.float32, device)}",
        providers,
        (stats, ends),
        lambda columns: largest_error(columns, *truth),
        device=device,
        work=read + 8 * len(NAMES) * sequences,
        unit="GB/s",
        reference="device copy",
    )
