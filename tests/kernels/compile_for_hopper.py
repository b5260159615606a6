"""Compiles the kernels for an H100, which need not be there, and prints what each takes; run by test_compilation.py.

The host functions run as they do on a GPU, up to the launch: Triton is given a driver that only says what to compile
for, and compiles in place of launching.
"""

import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Driver:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Of a thread: registers, and the bytes that found no place in them."""
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return int(re.search(r"REG:(\d+)", said).group(1)), int(re.search(r"STACK:(\d+)", said).group(1))


def compile_calls(calls):
    """Runs every call, with launches replaced by compilations, and prints a line for each kernel."""
    run = JITFunction.run
    name = None

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        registers, stack = registers_and_stack(kernel.asm["cubin"])
        print(
            f"{name}: {self.__name__}: {registers} registers, {stack} bytes of stack, "
            f"{kernel.metadata.shared} bytes shared, {kernel.asm['ptx'].count('wgmma.mma_async')} wgmma",
            flush=True,
        )
        return kernel

    JITFunction.run = compile_only
    for name, call in calls.items():  # noqa: B007 (what compile_only prints)
        call()


def calls():
    from dentropy.kernels import attention, attention_tangent, linear_token_stats, segments, sequence_sums, token_stats

    linear_token_stats._is_like_hopper = lambda device: True
    bf16 = torch.bfloat16
    N, V, D = 256, 50000, 128
    logits, hidden, weight, vector = (torch.zeros(*shape, dtype=bf16) for shape in ((N, V), (N, D), (V, D), (V,)))
    targets, cu_seqlens = torch.zeros(N, dtype=torch.int64), torch.tensor([0, N], dtype=torch.int32)
    found = {}
    for order, tangents in enumerate([(), (logits,), (logits, logits)]):
        found[f"logits, order {order}"] = lambda t=tangents: token_stats.token_stats(logits, targets, *t)
    found["logits, softcap"] = lambda: token_stats.token_stats(logits, targets, logits, logits, softcap=30.0)
    found["logits, odd rows"] = lambda: token_stats.token_stats(logits[:, 1:], targets, logits[:, 1:])

    def linear(**tangents):
        return lambda: linear_token_stats.linear_token_stats(hidden, weight, targets, **tangents)

    found |= {
        "head, primal": linear(),
        "head, fixed": linear(dhidden=hidden),
        "head, moving": linear(dhidden=hidden, dweight=weight),
        "head, moving alone": linear(dweight=weight),
        "head, bias and softcap": linear(dhidden=hidden, dweight=weight, bias=vector, dbias=vector, softcap=30.0),
    }
    found["head, float32"] = lambda: linear_token_stats.linear_token_stats(
        hidden.float(), weight.float(), targets, hidden.float(), weight.float()
    )

    found["shards"] = lambda: segments.merge_states(segments.new_states(3, N, 1, logits.device)[0], 1, 1.0)
    found["sums"] = lambda: sequence_sums.sequence_sums(*[torch.zeros(N)] * 6, cu_seqlens=cu_seqlens)
    for size, dtype, form in (
        (64, bf16, {}),
        (128, bf16, {}),
        (256, bf16, {}),
        (128, torch.float32, {}),
        (128, bf16, dict(window=100, softcap=30.0, sinks=torch.zeros(8))),
    ):
        q, k = torch.zeros(N, 8, size, dtype=dtype), torch.zeros(N, 2, size, dtype=dtype)
        settings = dict(scaling=0.1) | form
        found[f"attention, head size {size}, {dtype}, {list(form)}"] = lambda q=q, k=k, s=settings: (
            attention.packed_attention(q, k, k, cu_seqlens, **s),
            attention_tangent.attention_tangent(q, k, k, q, k, k, q, torch.zeros(8, N), cu_seqlens, **s),
        )
    return found


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    chosen = calls()
    compile_calls({name: call for name, call in chosen.items() if not sys.argv[1:] or name in sys.argv[1:]})
