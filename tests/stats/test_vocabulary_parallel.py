"""Heads sharded over processes: three CPU ranks with shards of unequal size, and two of them as a group of their own.

All cases run in one set of processes, which are this file as a script; the tests look at what each rank got.
"""

import math
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from truth import reference_in_float64

from dentropy import TokenStats, linear_token_stats
from dentropy.stats import plain

SHARDS = {3: (50, 7, 44), 2: (60, 41)}  # rows of each rank
V, D = 101, 12
MOVING = {
    "nothing": (),
    "hidden": ("dhidden",),
    "head": ("dweight",),
    "dbias": ("dbias",),
    "all": ("dhidden", "dweight", "dbias"),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

# As in kernels/conftest.py: the interpreter of Triton 3.6 cannot run loops with NumPy 2.4.
INTERPRETER_WORKS = find_spec("triton") is not None and not (
    version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
)

# path, dtype, what moves, ranks, rows, kind
CASES = [("plain", "float64", moving, ranks, 13, "plain") for moving in MOVING for ranks in SHARDS]
CASES += [
    (path, dtype, moving, 3, 13, "plain")
    for path in ("plain", "kernel")
    for dtype in ("float32", "bfloat16")
    for moving in ("nothing", "head", "all")
]
PATHS = (("plain", "float64"), ("kernel", "float32"))
CASES += [(path, dtype, "all", ranks, 13, "transform") for path, dtype in PATHS for ranks in SHARDS]
CASES += [
    (path, dtype, "all", 3, rows, kind)
    for path, dtype in PATHS
    for rows, kind in ((0, "plain"), (40, "plain"), (13, "empty shard"), (13, "int32"))
]


def inputs_of(dtype, moving, rows, kind, **_):
    """The whole head and what goes with it, by name."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (rows, D), "weight": (V, D), "bias": (V,)}
    shapes |= {"d" + name: shape for name, shape in shapes.items()}
    drawn = {
        name: torch.randn(shape, generator=generator).mul_(0.7).to(DTYPES[dtype]) for name, shape in shapes.items()
    }
    inputs = {name: drawn[name] for name in ("hidden", "weight", "bias", *MOVING[moving])}
    inputs["targets"] = torch.randint(V, (rows,), generator=generator)
    if kind == "int32":
        inputs["targets"] = inputs["targets"].to(torch.int32)
    if kind == "empty shard":
        inputs["bias"][50:57] = -math.inf  # all of rank 1
        inputs["targets"] = inputs["targets"] % 50
        inputs["targets"][4] = 52
    return inputs


def transform_of(kind):
    return dict(temperature=0.7, softcap=3.0) if kind == "transform" else {}


def described(case):
    return dict(zip(("path", "dtype", "moving", "ranks", "rows", "kind"), case))


def shard_of(inputs, rank, ranks):
    start = sum(SHARDS[ranks][:rank])
    rows = slice(start, start + SHARDS[ranks][rank])
    return inputs | {name: inputs[name][rows] for name in ("weight", "dweight", "bias", "dbias") if name in inputs}


def errors_of_bad_targets(rank):
    """What each implementation says of targets outside the vocabulary, or outside it but within the sizes of shards."""
    inputs = shard_of(inputs_of("float32", "all", 13, "plain"), rank, 3)
    for path in ("plain", "kernel"):
        os.environ["TRITON_INTERPRET"] = str(int(path == "kernel"))
        for bad in (-1, V, V + 7):
            inputs["targets"][5] = bad
            try:
                yield linear_token_stats(**inputs, process_group=dist.group.WORLD)
            except ValueError as error:
                yield path, bad, str(error)


def run_rank(rank, directory):
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, and at every call
    torch.set_num_threads(1)
    if INTERPRETER_WORKS:
        from dentropy.kernels import configurations
        from dentropy.kernels import linear_token_stats as head
        from interpreter import patch_at_launches_only

        patch_at_launches_only()
        tile = configurations.Tile(16, 16, 16, 4, 2)
        configurations.HEAD["least"] = dict.fromkeys(configurations.HEAD["least"], tile)
        head.SEGMENTS, head.ROWS_PER_LAUNCH = 3, 32
    plain.LOGITS_CHUNK = 5 * 50  # parts of 5 rows, and of more where the shard is small
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=3)
    groups = {3: dist.group.WORLD, 2: dist.new_group([0, 1])}
    results = {"bad targets": list(errors_of_bad_targets(rank))}
    for case in CASES:
        kind = described(case)
        if rank < kind["ranks"] and (kind["path"] == "plain" or INTERPRETER_WORKS):
            os.environ["TRITON_INTERPRET"] = str(int(kind["path"] == "kernel"))
            results[case] = tuple(
                linear_token_stats(
                    **shard_of(inputs_of(**kind), rank, kind["ranks"]),
                    **transform_of(kind["kind"]),
                    process_group=groups[kind["ranks"]],
                )
            )
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank got."""
    directory = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(directory)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "\n".join(errors)
    return [torch.load(directory / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_sharded_equals_unsharded(results, case):
    kind = described(case)
    if kind["path"] == "kernel" and not INTERPRETER_WORKS:
        pytest.skip("the interpreter of Triton 3.6 cannot run loops with NumPy 2.4; Triton 3.7 can")
    first, *others = (TokenStats(*result[case]) for result in results[: kind["ranks"]])
    inputs = inputs_of(**kind)
    truth = reference_in_float64("linear_token_stats", **inputs, **transform_of(kind["kind"]))
    digits = 1e-12 if kind["dtype"] == "float64" else 3e-6
    assert [name for name, field in first._asdict().items() if field is not None] == list(truth)
    assert int((truth["logp"] == -math.inf).sum()) == (kind["kind"] == "empty shard")
    for name, want in truth.items():
        got = getattr(first, name)
        assert got.dtype == (torch.float64 if kind["dtype"] == "float64" else torch.float32)
        for other in others:
            assert torch.equal(getattr(other, name), got)
        torch.testing.assert_close(got.double(), want, rtol=digits, atol=digits)


def test_a_target_out_of_range_is_the_same_error_on_every_rank(results):
    for result in results:
        assert result["bad targets"] == [
            (path, bad, f"targets[5]: {bad}, expected a token id in [0, {V})")
            for path in ("plain", "kernel")
            for bad in (-1, V, V + 7)
        ]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
