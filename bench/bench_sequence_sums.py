"""Per-sequence sums, first order: dentropy beside its NumPy path and beside plain PyTorch.

    pytest bench/bench_sequence_sums.py --benchmark-columns=median,iqr,rounds

Many short sequences, some thousands of middling ones and a few very long ones, float32; on a CPU in smaller
numbers and without the kernel. Every provider first has to agree with `dentropy.reference` on two sequences. With
each time are recorded the bytes that must be read and written and the rate that makes. "kernel" leaves its
columns on the GPU; "dentropy" is the public function, which ends with the table on the host, as do the rest.
"""

import numpy as np
import pytest
import torch

from dentropy import TokenStats, reference, sequence_sums
from dentropy.stats import plain

CASES = {  # sequences and the range of their lengths
    "cpu": {"short": (100_000, 0, 20), "middling": (1_000, 500, 1_500), "long": (4, 80_000, 100_000)},
    "cuda": {"short": (1_000_000, 0, 20), "middling": (8_192, 500, 1_500), "long": (16, 80_000, 100_000)},
}
NAMES = ("n_tokens", "logp", "entropy", "dlogp", "dentropy", "entropy_dlogp", "entropy_to_go", "length_to_go")


def dentropy(stats, ends):
    return sequence_sums(stats, ends).columns()


def numpy(stats, ends):
    return plain.sequence_sums(stats, ends).columns()


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


FUNCTIONS = {"kernel": kernel, "dentropy": dentropy, "NumPy": numpy, "plain PyTorch": plain_pytorch}


def make_inputs(sequences, shortest, longest, device):
    torch.manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (sequences,))
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logp, entropy, dlogp, dentropy = torch.randn(4, int(ends[-1]), device=device)
    return TokenStats(-logp.abs(), entropy.abs(), dlogp, dentropy), ends.to(device)


def assert_right(function, stats, ends):
    """A time is reported for no function that loses digits, on the last sequences of the case itself."""
    columns, ends = function(stats, ends), ends.tolist()
    last = TokenStats(*(value[ends[-3] :] for value in stats[:4]))
    truth, sizes = (  # of the terms, which are products of the tokens' values
        reference.sequence_sums(values, np.array(ends[-3:]) - ends[-3])
        for values in (last, TokenStats(*map(torch.abs, last[:4])))
    )
    for name in NAMES:
        got = np.array([float(value) for value in columns[name][-2:]])
        error, size = abs(got - getattr(truth, name)), getattr(sizes, name)
        assert (error <= 1e-9 * size).all(), f"{name} of the last sequences: {error}"


@pytest.mark.parametrize("provider", FUNCTIONS)
@pytest.mark.parametrize("case", ["short", "middling", "long"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_first_order(benchmark, device, case, provider):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if device == "cpu" and provider in ("kernel", "dentropy"):
        pytest.skip("on a CPU dentropy is NumPy")
    sequences, shortest, longest = CASES[device][case]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    benchmark.group = f"first order, float32, {sequences} sequences of {shortest} to {longest} tokens, {name}"
    stats, ends = make_inputs(sequences, shortest, longest, device)
    function = FUNCTIONS[provider]
    assert_right(function, stats, ends)

    def timed():
        function(stats, ends)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=10, warmup_rounds=2)
    moved = 4 * stats.logp.nbytes + ends.nbytes + 8 * len(NAMES) * sequences
    benchmark.extra_info.update(
        bytes_moved=moved,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        gigabytes_per_second=moved / benchmark.stats.stats.median / 1e9,
    )
