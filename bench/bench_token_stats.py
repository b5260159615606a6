"""Token statistics from logits, first order: dentropy beside PyTorch's forward mode and closed form.

    pytest bench/bench_token_stats.py --benchmark-columns=median,iqr,rounds

On a CPU: float32 at [1024, 50257]. With a GPU: bfloat16 at [8192, 151936] and [512, 151936] too, beside a
device copy. Every provider first has to agree with float64 on a few rows. With each time are recorded the
bytes that the statistics must read (logits and derivatives once), the rate that makes, and the peak memory
above inputs.
"""

import multiprocessing
from pathlib import Path

import pytest
import torch

from dentropy import token_stats

PROVIDERS = ("dentropy", "torch.func.jvp", "closed form")
CPU_SHAPE = (1024, 50257)
GPU_SHAPES = ((8192, 151936), (512, 151936))
MIB = 2**20


def dentropy(logits, targets, dlogits):
    return token_stats(logits, targets, dlogits)[:4]


def forward_mode(logits, targets, dlogits):
    """torch.func.jvp of log_softmax and entropy, in float32."""
    def log_prob_and_entropy(z):
        logp = torch.log_softmax(z, -1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    values, derivatives = torch.func.jvp(log_prob_and_entropy, (upcast(logits),), (upcast(dlogits),))
    return *values, *derivatives


def closed_form(logits, targets, dlogits):
    """The table's formulas, written down in eager PyTorch, in float32."""
    z, dz = upcast(logits), upcast(dlogits)
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    dlogp = dz - (p * dz).sum(-1, keepdim=True)
    at = targets[:, None]
    return (logp.gather(1, at)[:, 0], -(p * logp).sum(-1),
            dlogp.gather(1, at)[:, 0], -(p * dlogp * logp).sum(-1))


def upcast(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


FUNCTIONS = {"dentropy": dentropy, "torch.func.jvp": forward_mode, "closed form": closed_form}


def make_inputs(rows, vocabulary, dtype, device):
    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary, dtype=dtype, device=device).mul_(2)
    dlogits = torch.randn(rows, vocabulary, dtype=dtype, device=device)
    return logits, torch.randint(vocabulary, (rows,), device=device), dlogits


def assert_right(function, logits, targets, dlogits, rows=8):
    """A time is reported for no function whose float32 results are not those of float64."""
    few = logits[:rows], targets[:rows], dlogits[:rows]
    truth = forward_mode(few[0].double(), few[1], few[2].double())
    for got, want in zip(function(*few), truth):
        torch.testing.assert_close(got.double(), want, rtol=5e-5, atol=5e-5 * want.abs().max().item())


def run_and_report_peak(provider, shape, queue):
    """In a process of its own: peak resident memory above what is there with the inputs, in MiB."""
    inputs = make_inputs(*shape, torch.float32, "cpu")
    FUNCTIONS[provider](*(tensor[:2] for tensor in inputs))  # threads and libraries
    before = peak_resident()
    FUNCTIONS[provider](*inputs)
    queue.put(peak_resident() - before)


def peak_resident():
    """MiB; Linux. Not getrusage, whose maximum a child process inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def cpu_peak(provider, shape):
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=run_and_report_peak, args=(provider, shape, queue))
    process.start()
    process.join()
    assert process.exitcode == 0
    return queue.get()


def cuda_peak(provider, inputs):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    FUNCTIONS[provider](*inputs)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def record(benchmark, bytes_read, peak):
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(bytes_read=bytes_read, gigabytes_per_second=bytes_read / seconds / 1e9,
                                peak_mib_above_inputs=peak, threads=torch.get_num_threads(),
                                torch=torch.__version__)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_cpu_first_order(benchmark, provider):
    benchmark.group = f"first order, float32, {list(CPU_SHAPE)}, CPU"
    inputs = make_inputs(*CPU_SHAPE, torch.float32, "cpu")
    assert_right(FUNCTIONS[provider], *inputs)
    benchmark.pedantic(FUNCTIONS[provider], inputs, rounds=5, warmup_rounds=1)
    record(benchmark, 2 * inputs[0].nbytes, cpu_peak(provider, CPU_SHAPE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("provider", (*PROVIDERS, "device copy"))
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_cuda_first_order(benchmark, shape, provider):
    benchmark.group = f"first order, bfloat16, {list(shape)}, {torch.cuda.get_device_name()}"
    inputs = make_inputs(*shape, torch.bfloat16, "cuda")
    bytes_read = 2 * inputs[0].nbytes
    if provider == "device copy":
        target = torch.empty_like(inputs[0])
        function, peak = (lambda logits, *_: target.copy_(logits)), 0.0  # one tensor read, one written
    else:
        function = FUNCTIONS[provider]
        assert_right(function, *inputs)
        try:
            peak = cuda_peak(provider, inputs)
        except torch.cuda.OutOfMemoryError:
            pytest.skip(f"{provider} does not fit at {list(shape)}")

    def timed():
        function(*inputs)
        torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
    record(benchmark, bytes_read, peak)
