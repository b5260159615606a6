"""Memory of a rank with the policy sharded by FSDP2: measured on CPU ranks at small sizes, and on paper at large ones.

    python bench/sharded_memory.py [--ranks 1 2 4] [--tokens 256 1024] [--out FILE.json]

Each rank is a process. Measured is its anonymous memory (RssAnon of /proc, sampled every 2 ms) over what it has when a
model is about to be loaded: `loaded` with weights and direction there, `loading` at most until then, `pass` at most in
a pass with tangents at η ≠ 0. One rank is the model whole. A tiny model goes first, so that libraries are at work. On
paper, in bytes of a weight,

    pass = W/K + V + E + 4 max(P, E) + A T ,

W all weights, K ranks, V the direction's parts (W/K in float32, half of it in bfloat16; none where they stay in the
file, or on a card's host, and are brought a module at a time), P the weights of a layer, E = vocabulary × width (an
embedding or a head), one of which transformers' plan leaves gathered, and T tokens at a time; 4 for a module's weights,
gathered and moved, for its v, and for what gathering takes meanwhile. Of a whole model pass = 3 W + A T. A, of a token,
is 2 (6 D + 7 I) with tangents, D the width and I that of the MLP: 7 is what the growth with T was seen to need.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from machine import record

MIB, GB = 2**20, 1e9
SIZES = {  # of the models that are run: width, of the MLP, layers, vocabulary
    "52M": (512, 2048, 8, 16_000),
    "147M": (768, 3072, 12, 32_000),
    "255M": (1024, 4096, 12, 32_000),
}
LARGE = {  # width, of the MLP, layers, vocabulary, key and value heads' width together, all weights
    "7B (Qwen2.5)": (3584, 18_944, 28, 152_064, 512, 7.62e9),
    "32B (Qwen2.5)": (5120, 27_648, 64, 152_064, 1024, 32.8e9),
    "70B (Llama 3)": (8192, 28_672, 80, 128_256, 1024, 70.6e9),
}
CARDS, CARD_GB, TOKENS = 8, 80, 4096


def weights_of(width, inner, layers, vocabulary, of_keys):
    """(all, of a layer, of the embedding)."""
    layer = 2 * width * width + 2 * width * of_keys + 3 * width * inner + 2 * width
    embedding = vocabulary * width
    return 2 * embedding + layers * layer + width, layer, embedding


# Of a direction: the file it is in, and the share of the weights that its parts are of.
DIRECTIONS = {"float32": ("v", 1.0), "bfloat16": ("v16", 0.5), "float32, in its file": ("v", 0.0)}


def on_paper(
    all_weights, layer, embedding, width, inner, ranks, tokens, size=4, direction="float32"
) -> dict[str, float]:
    """Bytes of a rank, by part."""
    activations = tokens * 2 * (6 * width + 7 * inner) * size
    if ranks == 1:
        return dict(weights=all_weights * size, direction=all_weights * size, gathered=all_weights * size) | dict(
            activations=activations
        )
    return dict(
        weights=all_weights * size / ranks,
        direction=DIRECTIONS[direction][1] * all_weights * size / ranks,
        gathered=(embedding + 4 * max(layer, embedding)) * size,
        activations=activations,
    )


class Peak:
    """The most anonymous memory since the last look, in bytes."""

    def __init__(self):
        self._most, self._stop = 0, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self):
        while not self._stop:
            self._most = max(self._most, now())
            time.sleep(0.002)

    def take(self) -> int:
        found, self._most = max(self._most, now()), 0
        return found


def now() -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def build(folder, width, inner, layers, vocabulary):
    os.mkdir(folder)
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from dentropy import Direction

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    os.mkdir(f"{folder}/directions")
    for name, dtype in (("v", torch.float32), ("v16", torch.bfloat16)):
        Direction({key: x.to(dtype) for key, x in v.items()}, 1e-6).save(f"{folder}/directions/{name}.safetensors")
    model.to(torch.bfloat16).save_pretrained(folder)  # what is loaded as it is saved stays in the file, and is not seen


def run(rank, ranks, place, tiny, folder, tokens, vocabulary):
    """Writes what the rank's memory was: at rest, loading, in passes of so many tokens."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    import torch
    import torch.distributed as dist

    from dentropy import Direction, PackedBatch, Policy, measure

    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=ranks)
    peak, found = Peak(), {}
    for model, columns in ((tiny, 100), (folder, vocabulary)):
        rng = np.random.default_rng(0)
        for name in DIRECTIONS if ranks > 1 else ("float32",):
            start = now()
            peak.take()
            policy = Policy.from_pretrained(model, device="cpu", shard=ranks > 1)
            path = f"{model}/directions/{DIRECTIONS[name][0]}.safetensors"
            direction = Direction.load(path, policy.model if ranks > 1 else None)
            if "file" not in name:  # whose pages are not counted
                tensors = {key: v.clone() for key, v in direction.tensors.items()}
                direction = Direction(tensors, direction.step_size)
                del tensors
            policy.moving(direction)
            found[name] = {"loading": peak.take() - start, "loaded": now() - start, "pass": {}}
            for count in tokens:
                answers = [rng.integers(0, columns, 128).tolist() for _ in range(ranks * count // 128)]
                batch = PackedBatch.from_lists([[3]] * len(answers), answers)
                peak.take()
                measure(policy, batch, direction, eta=1e-6, order=1, token_budget=count)
                found[name]["pass"][count] = peak.take() - start
            del policy, direction
            gc.collect()
    Path(place, f"{rank}.json").write_text(json.dumps(found))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def measured(name, ranks, tokens) -> list[dict]:
    shape = SIZES[name]
    with tempfile.TemporaryDirectory() as place:
        tiny, folder = f"{place}/tiny", f"{place}/model"
        build(tiny, 64, 64, 2, 100)
        build(folder, *shape)
        rows = []
        for count in ranks:
            here = Path(place, str(count))
            here.mkdir()
            arguments = (count, here, tiny, folder, tokens, shape[-1])
            context = multiprocessing.get_context("spawn")
            processes = [context.Process(target=run, args=(rank, *arguments)) for rank in range(count)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            found = [json.loads(Path(here, f"{rank}.json").read_text()) for rank in range(count)]
            for direction in found[0]:
                rows.append(row_of(name, shape, count, direction, [each[direction] for each in found]))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def row_of(name, shape, ranks, direction, found) -> dict:
    """In MiB, of the rank that needed most."""
    width, inner, *_ = shape
    everything = weights_of(*shape, width)
    row = dict(model=name, weights_MiB=round(4 * everything[0] / MIB), ranks=ranks, direction=direction)
    row |= {f"{what}_MiB": round(max(each[what] for each in found) / MIB) for what in ("loading", "loaded")}
    for tokens in found[0]["pass"]:
        paper = sum(on_paper(*everything, width, inner, ranks, int(tokens), direction=direction).values())
        row[f"pass_{tokens}_MiB"] = round(max(each["pass"][tokens] for each in found) / MIB)
        row[f"pass_{tokens}_on_paper_MiB"] = round(paper / MIB)
    return row


def table() -> str:
    """Of large models on one node of cards, in GB of a rank."""
    lines = [
        f"| model, float32, {CARDS} ranks, {TOKENS:,} tokens | weights | direction | gathered | activations | in all |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (width, inner, layers, vocabulary, of_keys, everything) in LARGE.items():
        _, layer, embedding = weights_of(width, inner, layers, vocabulary, of_keys)
        parts = on_paper(everything, layer, embedding, width, inner, CARDS, TOKENS)
        total = sum(parts.values()) / GB
        said = f"{total:.0f}" if total <= CARD_GB else f"{total:.0f}: does not fit"
        lines.append(f"| {name} | {' | '.join(f'{x / GB:.1f}' for x in parts.values())} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(table())
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # of the ranks: what is freed is given back, and not counted
    rows = [row for name in options.sizes for row in measured(name, options.ranks, options.tokens)]
    if options.out is not None:
        options.out.write_text(json.dumps(dict(record(), rows=rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
