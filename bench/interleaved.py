"""What the benchmarks share: providers timed in turn, each held against float64 first.

A test is one case, and times all its providers: in a round each of them runs, one after the other, and there
are ROUNDS rounds. A provider's time in a round is the median of a few calls in a row; what is reported is the
median over the rounds. Whatever slows the machine for a while slows them all, so ratios are taken within
rounds. On a CPU with one thread it is the process's own time, in which nobody else's work counts.

A peer that cannot be imported, raises or misses its tolerance is a row that says so. Of dentropy's own ways the same is
recorded, and then the case fails.

pytest-benchmark times, and prints, the round as a whole; the figures of the providers are in the case's
extra_info, from where `report.py` takes them:

    pytest bench/bench_token_stats.py --benchmark-json=run.json && python bench/report.py run.json
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

ROUNDS = 5
SECONDS = 0.2  # that a provider runs in a round, about, if one call is shorter
MIB = 2**20
LEFT_OUT: dict[str, str] = {}  # providers that are not to run, and why


class Inaccurate(ArithmeticError):
    """A result that misses its tolerance."""


class GPUIsLost(RuntimeError):
    """args: the provider that lost it, and what it raised. The process can do nothing more on the GPU."""


class Provider(NamedTuple):
    """One way of doing a case's work."""

    call: Callable
    tolerance: float | None = None  # of its error; None: it computes something else, a ceiling say
    package: str | None = None  # must be installed
    cuda: bool = False  # runs on CUDA alone
    work: float | None = None  # where it differs from the case's


def compare(
    benchmark,
    title: str,
    providers: dict[str, Provider],
    inputs: tuple,
    error_of: Callable,
    *,
    device: str,
    work: float | None = None,
    unit: str | None = None,
    reference: str,
    headline: bool = False,
    rounds: int = ROUNDS,
) -> None:
    """Times `providers` on `inputs` and leaves in extra_info, by provider: median, least and largest time of
    the rounds, peak memory above the inputs, error, rate, and the median of its time relative to the
    `reference` provider's in the same round, with the fraction of the reference's rate that makes; or, as
    "not_run", why there are no figures.

    error_of: what a provider returned -> its largest error relative to float64. work: bytes, for a unit of GB/s, or
    operations, for TFLOP/s. headline: belongs into the chart. rounds: more of them for ratios near 1.

    Raises AssertionError where one of dentropy's own providers failed, all else being recorded, and GPUIsLost.
    """
    calls = {name: partial(provider.call, *inputs) for name, provider in providers.items()}
    failed: dict[str, str] = {}

    def attempt(name: str, action: Callable):
        """What `action` returns; None where it fails."""
        try:
            return action()
        except Exception as error:
            failed[name] = reason(error)
        _check_gpu(name, failed[name], device)  # here, where the error and what it holds are gone
        return None

    rows: dict[str, dict] = {}
    for name, provider in providers.items():
        missing = _missing(name, provider, device)
        if missing:
            rows[name] = {"not_run": missing}
        else:
            rows[name] = attempt(name, partial(_first, provider, calls[name], error_of, device)) or {}
    times = {name: [] for name, row in rows.items() if "calls_per_round" in row}

    def one_round():
        for name in [name for name in times if name not in failed]:
            seconds = attempt(name, partial(seconds_of, calls[name], device, rows[name]["calls_per_round"]))
            times[name].append(seconds)

    benchmark.group = title
    benchmark.pedantic(one_round, rounds=rounds)
    rows |= {name: {"not_run": why} for name, why in failed.items()}
    times = {name: seconds for name, seconds in times.items() if name not in failed}
    for name, seconds in times.items():
        rows[name] |= _figures(seconds, times.get(reference))
        amount = providers[name].work or work
        if amount is not None:
            rows[name]["rate"] = amount / statistics.median(seconds) / {"GB/s": 1e9, "TFLOP/s": 1e12}[unit]
        if amount is not None and reference in times:
            of_reference = amount / (providers[reference].work or work)
            rows[name]["fraction_of_reference"] = of_reference / rows[name]["times_reference"]
    benchmark.extra_info.update(
        title=title,
        device=device,
        rounds=rounds,
        work=work,
        unit=unit,
        reference=reference,
        headline=headline,
        providers=rows,
    )
    ours = {name: why for name, why in failed.items() if name.startswith("dentropy")}
    assert not ours, ours


def _missing(name: str, provider: Provider, device: str) -> str | None:
    """Why a provider is not even tried."""
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    if provider.cuda and device != "cuda":
        return "needs a GPU"
    if provider.package is not None and find_spec(provider.package) is None:
        return f"{provider.package} is not installed"
    return None


def _first(provider: Provider, call: Callable, error_of: Callable, device: str) -> dict:
    """The error of a first call's result, the peak memory of a second, and how many calls make a round."""
    row = {}
    output = call()
    if device == "cuda":
        torch.cuda.synchronize()
    if provider.tolerance is not None:
        row["error"] = error_of(output)
        if not row["error"] <= provider.tolerance:
            raise Inaccurate(f"error {row['error']:.1e}, above {provider.tolerance:.0e}")
    del output
    row["peak_mib_above_inputs"] = peak_above(call, device)
    row["calls_per_round"] = min(20, 1 + int(SECONDS / seconds_of(call, device, repeats=1)))
    return row


def _figures(seconds: list[float], of_reference: list[float] | None) -> dict:
    figures = dict(median_ms=1e3 * statistics.median(seconds), min_ms=1e3 * min(seconds), max_ms=1e3 * max(seconds))
    if of_reference is not None:
        figures["times_reference"] = statistics.median(mine / its for mine, its in zip(seconds, of_reference))
    return figures


def reason(error: Exception) -> str:
    """For a row: what kind of failure, and the first words of it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, Inaccurate):
        return str(error)
    kind = "cannot be imported" if isinstance(error, ImportError) else type(error).__name__
    return f"{kind}: {' '.join(str(error).split())[:120]}"


def _check_gpu(name: str, why: str, device: str) -> None:
    """GPUIsLost where a failure left a context in which nothing runs any more: others are not to be blamed for it."""
    if device != "cuda":
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise GPUIsLost(name, why) from error


def seconds_of(call: Callable, device: str, repeats: int) -> float:
    """The median time of `repeats` calls in a row."""
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        times = []
        for _ in range(repeats):
            start = clock()
            call()
            times.append(clock() - start)
        return statistics.median(times)
    flush = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()  # empties the cache, and gives the host time to launch ahead
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)


def peak_above(call: Callable, device: str) -> float:
    """Peak memory of a call above what was there, in MiB: PyTorch's on CUDA, resident on a CPU (Linux)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, so that using it again counts
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def largest_error(got, want) -> float:
    """The largest difference of `got` to `want`, over the largest value of its kind; NaN where one is."""
    pairs = zip(got, want)  # a provider may know less than the truth: log-probabilities alone
    return float(torch.stack([(g.double() - w).abs().max() / w.abs().max() for g, w in pairs]).max())


def name_of(dtype: torch.dtype, device: str) -> str:
    """For titles: "float32, CPU"."""
    return f"{str(dtype).removeprefix('torch.')}, {device_name(device)}"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"
