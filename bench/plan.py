"""What `prove.py` does, the most important first: tests, and cases of the benchmarks with the goals they have."""

from collections.abc import Callable
from typing import NamedTuple

KERNELS = "tests/kernels"
REAL_SIZES = "((real_sizes and 128) or real_models or flash or many_rows) and not reference"
REST = f"not ({REAL_SIZES}) and not compilation and not two_to_the_31"

DRY = (f"{KERNELS}/test_products.py", "tests/test_devices.py", "-k", "products or anywhere")


class Checks(NamedTuple):
    """A run of pytest."""

    name: str
    full: tuple[str, ...]  # its arguments
    tiny: tuple[str, ...] | None  # in a dry run; None: left out
    minutes: float  # at most


class Goal(NamedTuple):
    what: str
    read: Callable[[dict], float]  # from the rows of a case's providers
    least: float | None = None
    most: float | None = None

    def is_met(self, rows: dict) -> bool:
        value = self.read(rows)
        return value >= self.least if self.most is None else value <= self.most


class Case(NamedTuple):
    """A case of a benchmark: module and function, and its arguments, on a GPU and in a dry run (None: left out)."""

    name: str
    function: str
    full: dict
    tiny: dict | None
    kernels: dict = {}  # noqa: RUF012 (kernel -> the provider that is it alone): lines of the roofline
    goals: tuple[Goal, ...] = ()


def fraction(provider: str, least: float) -> Goal:
    """Of the reference's rate."""
    return Goal(f"{least:.0%} of the reference's rate", lambda rows: rows[provider]["fraction_of_reference"], least)


def logits(order: int, rows: int = 8192) -> Case:
    main = rows == 8192
    return Case(
        f"logits, order {order}, {rows} rows",
        "bench_token_stats.test_token_stats",
        dict(device="cuda", rows=rows, vocabulary=151936, order=order),
        dict(device="cpu", rows=8, vocabulary=300, order=order) if main else None,
        {"token_states": "dentropy"} if main else {},
        (fraction("dentropy", 0.97),) if main else (),
    )


def head(moves: int, dtype: str, depth: int) -> Case:
    least, main = {1: 0.94, 2: 0.88}.get(moves), depth == 4096
    return Case(
        f"head, {('primal', 'fixed', 'moving')[moves]}, {dtype}, D {depth}",
        "bench_linear_token_stats.test_linear_token_stats",
        dict(device="cuda", dtype=dtype, rows=8192, vocabulary=151936, depth=depth, moves=moves),
        dict(device="cpu", dtype="float32", rows=16, vocabulary=300, depth=32, moves=moves) if main else None,
        {"linear_states": "dentropy"} if main or dtype == "float32" else {},
        (fraction("dentropy", least),) if main and least else (),
    )


def attention(dtype: str, sequences: int, length: int) -> Case:
    tangent, main = "dentropy, tangent alone", (dtype, length) == ("bfloat16", 4096)
    goal = Goal("500 TFLOP/s", lambda rows: rows[tangent]["rate"], least=500)
    return Case(
        f"attention, {dtype}, {sequences} x {length}, d 128",
        "bench_attention.test_attention",
        dict(device="cuda", dtype=dtype, sequences=sequences, length=length, heads=16, kv_heads=4, size=128),
        dict(device="cpu", dtype="float32", sequences=2, length=80, heads=4, kv_heads=2, size=16) if main else None,
        {"attention": "dentropy, forward alone", "attention_tangent": tangent} if length == 4096 else {},
        (goal,) if main else (),
    )


def whole_pass(dtype: str, model: str, length: int) -> Case:
    main = (dtype, model, length) == ("bfloat16", "1.5B", 1024)
    goals = (
        Goal("2.2 times a plain forward", lambda rows: rows["dentropy"]["times_reference"], most=2.2),
        Goal(
            "4 times faster than the classic loop",
            lambda rows: rows["classic loop"]["median_ms"] / rows["dentropy"]["median_ms"],
            least=4,
        ),
    )
    return Case(
        f"whole pass, {model}, {dtype}, {8192 // length} x {length}",
        "bench_pass.test_pass",
        dict(device="cuda", dtype=dtype, name=model, n_tokens=8192, length=length),
        dict(device="cpu", dtype="float32", name="tiny", n_tokens=96, length=48) if main else None,
        goals=goals if main else (),
    )


def sums(name: str, sequences: int, shortest: int, longest: int) -> Case:
    return Case(
        f"sums, {name} sequences",
        "bench_sequence_sums.test_sequence_sums",
        dict(device="cuda", case=name, sequences=sequences, shortest=shortest, longest=longest),
        dict(device="cpu", case=name, sequences=50, shortest=0, longest=20) if name == "middling" else None,
        {"sequence_sums": "dentropy, columns left on the GPU"} if name == "middling" else {},
    )


STEPS: tuple[Checks | Case, ...] = (
    Checks("kernels at real sizes", (KERNELS, "-k", REAL_SIZES), None, 2),
    Checks("end to end", ("tests/test_devices.py", "-k", "cuda"), DRY, 2),
    *(logits(order) for order in range(3)),
    *(head(moves, "bfloat16", 4096) for moves in range(3)),
    attention("bfloat16", 2, 4096),
    whole_pass("bfloat16", "1.5B", 1024),
    *(head(moves, "float32", 1536) for moves in range(3)),
    attention("float32", 2, 4096),
    whole_pass("float32", "1.5B", 1024),
    sums("middling", 8192, 500, 1500),
    Checks("the other tests of the kernels", (KERNELS, "-k", REST), None, 3),
    *(head(moves, "bfloat16", 1536) for moves in range(3)),
    *(attention("bfloat16", 8192 // length, length) for length in (1024, 8192)),
    *(whole_pass("bfloat16", "1.5B", length) for length in (512, 4096)),
    whole_pass("bfloat16", "0.5B", 1024),
    *(logits(order, 512) for order in range(3)),
    sums("short", 1_000_000, 0, 20),
    sums("long", 16, 80_000, 100_000),
    Checks("more than 2**31 elements", (KERNELS, "-k", "two_to_the_31"), None, 3),
)
