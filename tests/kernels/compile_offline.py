"""Compiles the kernels for GPUs that need not be there, and prints what each takes, a line of JSON for each kernel.

    python compile_offline.py 86                     # the compute capability, without its point
    python compile_offline.py 90 "head, moving"      # only some of the calls

The host functions run as they do on a GPU, up to the launch: Triton is given a driver that only says what to compile
for, and compiles in place of launching.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program can have
PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")  # instructions of tensor cores, by generation


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: int):
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Of a thread: registers, and the bytes that found no place in them."""
    said = cuobjdump("-res-usage", cubin)
    return int(re.search(r"REG:(\d+)", said).group(1)), int(re.search(r"STACK:(\d+)", said).group(1))


def spills_in_loops(cubin: bytes) -> int:
    """Instructions inside a loop that write or read what found no place in registers."""
    code = [
        (int(place, 16), instruction)
        for place, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", cuobjdump("-sass", cubin))
    ]
    branches = [(at, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", instruction)) for at, instruction in code]
    loops = [(int(to.group(1), 16), at) for at, to in branches if to and int(to.group(1), 16) < at]
    spills = [at for at, instruction in code if re.search(r"\b(LDL|STL)\b", instruction)]
    return sum(any(first <= at <= last for first, last in loops) for at in spills)


def cuobjdump(what: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_calls(calls, architecture: int):
    """Runs every call, with launches replaced by compilations, and prints a line for each kernel."""
    run = JITFunction.run
    name = None

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        registers, stack = registers_and_stack(kernel.asm["cubin"])
        found = dict(
            call=name,
            kernel=self.__name__,
            registers=registers,
            stack=stack,
            spills_in_loops=spills_in_loops(kernel.asm["cubin"]) if stack else 0,
            shared=kernel.metadata.shared,
            most_shared=SHARED_MEMORY[architecture] * 1024,
            tensor_memory=getattr(kernel.metadata, "tmem_size", 0),
            warps=kernel.metadata.num_warps,
            products=sum(kernel.asm["ptx"].count(instruction) for instruction in PRODUCTS),
        )
        print(json.dumps(found), flush=True)
        return kernel

    JITFunction.run = compile_only
    for name, call in calls.items():  # noqa: B007 (what compile_only prints)
        call()


def of_logits(N, V):
    from dentropy.kernels.token_stats import token_stats

    logits, targets = torch.zeros(N, V, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.int64)
    calls = {
        f"logits, order {order}": lambda t=(logits,) * order: token_stats(logits, targets, *t) for order in range(3)
    }
    calls["logits, softcap"] = lambda: token_stats(logits, targets, logits, logits, softcap=30.0)
    calls["logits, odd rows"] = lambda: token_stats(logits[:, 1:], targets, logits[:, 1:])
    return calls


def of_the_head(N, V, D):
    from dentropy.kernels.linear_token_stats import linear_token_stats

    hidden, weight, vector = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((N, D), (V, D), (V,)))
    targets = torch.zeros(N, dtype=torch.int64)

    def call(*moving, view=lambda x: x, **settings):
        h, w = view(hidden), view(weight)
        tangents = {name: h if name == "dhidden" else w for name in moving}
        return lambda: linear_token_stats(h, w, targets, **tangents, **settings)

    moving, biases = ("dhidden", "dweight"), dict(bias=vector, dbias=vector)
    return {
        "head, primal": call(),
        "head, fixed": call("dhidden"),
        "head, moving": call(*moving),
        "head, moving alone": call("dweight"),
        "head, bias and softcap": call(*moving, **biases, softcap=30.0),
        "head, moving, odd rows": call(*moving, view=lambda x: x[:, 1:]),
        "head, primal, float32": call(view=torch.Tensor.float),
        "head, moving, float32": call(*moving, view=torch.Tensor.float),
        "head, moving, float32, odd rows": call(*moving, view=lambda x: x.float()[:, 1:]),
    }


def of_attention(N):
    from dentropy.kernels.attention import packed_attention
    from dentropy.kernels.attention_tangent import attention_tangent

    cu_seqlens = torch.tensor([0, N], dtype=torch.int32)

    def call(size, dtype, form):
        q, k = torch.zeros(N, 8, size, dtype=dtype), torch.zeros(N, 2, size, dtype=dtype)
        settings = dict(scaling=0.1) | form

        def both():
            packed_attention(q, k, k, cu_seqlens, **settings)
            attention_tangent(q, k, k, q, k, k, q, torch.zeros(8, N), cu_seqlens, **settings)

        return both

    everything = dict(window=100, softcap=30.0, sinks=torch.zeros(8))
    half, full = torch.bfloat16, torch.float32
    forms = [(size, dtype, {}) for dtype in (half, full) for size in (64, 128, 256)]
    forms += [(size, half, everything) for size in (128, 256)]
    return {", ".join(["attention", str(form[0]), str(form[1]), *form[2]]): call(*form) for form in forms}


def all_calls():
    from dentropy.kernels import segments, sequence_sums

    N, V, D = 256, 50000, 128
    ends = torch.tensor([0, N], dtype=torch.int32)
    return {
        **of_logits(N, V),
        **of_the_head(N, V, D),
        "shards": lambda: segments.merge_states(segments.new_states(3, N, 1, torch.device("cpu"))[0], 1, 1.0),
        "sums": lambda: sequence_sums.sequence_sums(*[torch.zeros(N)] * 7, cu_seqlens=ends),
        **of_attention(N),
    }


def main(architecture: int, *names: str):
    from dentropy.kernels import configurations

    there = configurations.Hardware(architecture, SHARED_MEMORY[architecture])
    configurations.hardware = lambda device: there
    triton.runtime.driver.set_active(Driver(architecture))
    compile_calls({name: call for name, call in all_calls().items() if name in names or not names}, architecture)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
