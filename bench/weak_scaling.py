"""Weak scaling of the pass: K ranks with K times the rollouts, what a token then costs.

    python bench/weak_scaling.py [--ranks 1 2] [--rounds 5] [--out FILE.json]

A pass with tangents over rollouts of one length, `--per-rank` of them for each rank, through a Qwen2-shaped policy with
random weights. Ranks are processes with one thread each on a CPU (Gloo), or with a card each (NCCL, --device cuda). The
numbers of ranks take turns, one round after the other: on a busy machine the wall clock is that of the others too, and
`cpu` says what a rank itself computed. Both are microseconds of a rank for each of its own generated tokens, medians
over rounds with the smallest and largest beside them: with perfect scaling they do not depend on K. `same_table` says
whether the rollouts that all K have in common got the same bits.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

SHAPE = dict(vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
SHAPE |= dict(intermediate_size=1024)
LENGTH, PROMPT, TOKENS = 256, 32, 2048  # of a rollout, of its prompt, of a microbatch


def rank(folder: Path, number: int, count: int, per_rank: int, device: str) -> None:
    """One process: its seconds and a digest of the first rollouts' rows, written into the folder."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, Qwen2Config

    from dentropy import Direction, PackedBatch, Policy, measure

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(number)
    if count > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=number, world_size=count)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE)).to(device)
    policy = Policy(model)
    direction = Direction({name: torch.randn_like(p) for name, p in model.named_parameters()})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SHAPE["vocab_size"], (count * per_rank, LENGTH), generator=generator).tolist()
    batch = PackedBatch.from_lists([row[:PROMPT] for row in ids], [row[PROMPT:] for row in ids])
    measure(policy, batch.take(range(count)), direction, token_budget=TOKENS)  # warms up
    if count > 1:
        dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    table = measure(policy, batch, direction, token_budget=TOKENS)
    took = dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
    rows = table.take(range(per_rank))
    took["digest"] = hashlib.sha256(b"".join(column.tobytes() for column in rows.columns().values())).hexdigest()
    took["tokens"] = batch.n_tokens // count
    (folder / f"{number}.json").write_text(json.dumps(took))
    if count > 1:
        dist.destroy_process_group()


def run(count: int, per_rank: int, device: str) -> list[dict]:
    """What each of so many ranks found."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--folder", folder, "--count", str(count), "--device", device]
        words += ["--per-rank", str(per_rank)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = [subprocess.Popen([*words, "--number", str(n)], env=environment) for n in range(count)]
        ended = [process.wait() for process in started]
        if any(ended):
            raise SystemExit(f"weak scaling: one of {count} ranks failed")
        return [json.loads(Path(folder, f"{n}.json").read_text()) for n in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--per-rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    for hidden in ("--folder", "--number", "--count"):
        parser.add_argument(hidden, type=Path if hidden == "--folder" else int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        rank(options.folder, options.number, options.count, options.per_rank, options.device)
        return
    from machine import record

    taken = {count: [] for count in options.ranks}
    for _ in range(options.rounds):
        for count in options.ranks:
            taken[count] += run(count, options.per_rank, options.device)
    lines = []
    for count, found in taken.items():
        line = dict(ranks=count, rollouts=count * options.per_rank)
        for clock in ("wall", "cpu"):
            per_token = sorted(1e6 * one[clock] / one["tokens"] for one in found)
            shown = (statistics.median(per_token), per_token[0], per_token[-1])
            line[f"{clock}_us_per_token"] = [round(x) for x in shown]
        digests = {one["digest"] for one in (*found, taken[options.ranks[0]][0])}
        lines.append(line | dict(same_table=len(digests) == 1))
        print(json.dumps(lines[-1]), flush=True)
    if options.out is not None:
        content = dict(record(), shape=SHAPE, length=LENGTH, microbatch_tokens=TOKENS, lines=lines)
        options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
