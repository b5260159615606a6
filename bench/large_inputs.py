"""Everything but the model on large inputs: seconds and peak memory of estimators, of the table on disk, of reading.

    python bench/large_inputs.py [--rollouts 1000000] [--files 50000 200000] [--tokens 64] [--out FILE.json]

The table is of made-up rollouts, eight to a prompt; what needs the values of single tokens (prefix weights, the
forecast) is not in it. A file has --files rollouts of that many prompt and response tokens together, and is read in a
process of its own; its peak is given beside that of one which only imports, and both beside what the batch itself
holds. Seconds are those of the processor.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from machine import machine

from dentropy.estimators import curvature, importance, slope
from dentropy.experiment import rollout_rows, run_folder
from dentropy.stats.tables import SequenceSums

MIB = 2**20
READ = """
import sys, time, resource
from dentropy.rollouts.reading import read_rollouts
start = time.process_time()
batch = read_rollouts(sys.argv[1]) if len(sys.argv) > 1 else None
held = 0 if batch is None else sum(x.nbytes for x in vars(batch).values() if hasattr(x, "nbytes"))
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, held)
"""


def tables(rollouts: int) -> tuple[SequenceSums, SequenceSums]:
    """At the base weights, with second order, and moved."""
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(1, 512, rollouts).astype(float)
    entropy = n_tokens * rng.uniform(0.5, 1.5, rollouts)
    logp = -entropy + np.sqrt(n_tokens) * rng.normal(size=rollouts)
    dlogp, dentropy, *second = np.sqrt(n_tokens) * rng.normal(size=(7, rollouts))
    columns = {
        **dict(n_tokens=n_tokens, group=np.arange(rollouts) // 8, rollout=np.arange(rollouts)),
        **dict(dlogp=dlogp, dentropy=dentropy, entropy_dlogp=dlogp, entropy_to_go=n_tokens * dlogp / 2),
        **dict(length_to_go=n_tokens * dlogp / 2, fisher=n_tokens * 0.1),
        **dict(d2logp=second[0], d2entropy=second[1], dentropy_to_go=second[2], entropy_to_go_2=second[3]),
        **dict(length_to_go_2=second[4]),
    }
    moved = {name: columns[name] for name in ("n_tokens", "group", "rollout")}
    base = SequenceSums(logp=logp, entropy=entropy, **columns)
    return base, SequenceSums(logp=logp + 1e-3 * dlogp, entropy=entropy + 1e-3 * dentropy, **moved)


def seconds(call) -> float:
    start = time.process_time()
    call()
    return round(time.process_time() - start, 2)


def estimators(rollouts: int) -> dict:
    base, moved = tables(rollouts)
    reward = np.random.default_rng(1).integers(0, 2, rollouts).astype(float)
    found = {f"{name} slope": seconds(lambda name=name: slope(base, estimator=name)) for name in ("causal", "exact")}
    found |= {
        f"{name} curvature": seconds(lambda name=name: curvature(base, estimator=name)) for name in ("causal", "exact")
    }
    found["importance"] = seconds(lambda: importance(base, moved))
    columns = rollout_rows.columns(base, reward, {"slope_causal": slope(base)}, [])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, run_folder.ROLLOUTS)
        found[f"{path.name} ({len(columns)} columns)"] = seconds(lambda: run_folder._write_parquet(path, columns))
        size = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return dict(rollouts=rollouts, seconds=found, table_MiB=size // MIB, peak_MiB=peak)


def reading(rollouts: int, tokens: int) -> dict:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rollouts.jsonl")
        with open(path, "w") as file:
            for i in range(rollouts):
                ids = rng.integers(0, 150_000, tokens).tolist()
                row = dict(prompt_ids=ids[:16], response_ids=ids[16:], group=i // 8, reward=i % 2, temperature=1.0)
                file.write(json.dumps(row) + "\n")
        size = path.stat().st_size
        (_, empty, _), (took, peak, held) = (in_a_process(*arguments) for arguments in ((), (path,)))
    return dict(
        **dict(rollouts=rollouts, tokens=tokens, file_MiB=size // MIB, seconds=round(took, 1)),
        **dict(peak_MiB=int(peak) // 1024, imports_MiB=int(empty) // 1024, batch_MiB=int(held) // MIB),
    )


def in_a_process(*arguments) -> list[float]:
    said = subprocess.run([sys.executable, "-c", READ, *arguments], capture_output=True, text=True, check=True).stdout
    return [float(word) for word in said.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, nargs="*", default=[50_000, 200_000])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = dict(machine=machine(), reading=[])
    for rollouts in options.files:
        found["reading"].append(reading(rollouts, options.tokens))
        print(json.dumps(found["reading"][-1]), flush=True)
    found["estimators"] = estimators(options.rollouts)
    print(json.dumps(found["estimators"], indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
