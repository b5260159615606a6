"""Everything but the model on large inputs: seconds and peak memory from the file to the last estimate.

    python bench/large_inputs.py [--rollouts 10000 100000] [--tokens 512] [--rows 100000 1000000] [--out FILE.json]

For each of --rollouts, a file of so many rollouts of --tokens prompt and response tokens is read, walked through with
made-up statistics in the place of the model's (at the base weights, moved by η and by −η), summed, judged by the
estimators of a probe and written as rollouts.parquet, in a process of its own. `anonymous_MiB` is the most that was in
memory and not in a file, `peak_MiB` all of it; pages of files count in the latter and are given back where memory runs
short. For each of --rows, the estimators see a table of so many rollouts of eight tokens. Seconds are those of the
processor.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from machine import record

from dentropy import estimators as e
from dentropy.estimators.attribution import token_coefficients
from dentropy.experiment import rollout_rows, run_folder
from dentropy.passes.alone import blame_rollouts
from dentropy.passes.microbatches import Microbatch, TokenBudget, in_rollout_order, walk
from dentropy.passes.second_order import with_second_order
from dentropy.rollouts.reading import read_rollouts
from dentropy.stats.sequence_sums import sequence_sums
from dentropy.stats.tables import TokenStats

MIB, ETA, PROMPT, PER_PROMPT = 2**20, 1e-3, 64, 8


def write(path: Path, rollouts: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for i in range(rollouts):
            ids = rng.integers(0, 150_000, tokens).tolist()
            row = dict(prompt_ids=ids[:PROMPT], response_ids=ids[PROMPT:], group=i // PER_PROMPT)
            file.write(json.dumps(row | dict(reward=float(rng.integers(2)), temperature=1.0)) + "\n")


def made_up(places: np.ndarray, eta: float, tangent: bool) -> TokenStats:
    """Statistics of a microbatch's tokens, the same for all η but for what moves with it."""
    rng = np.random.default_rng(int(places[0]))
    drawn = rng.standard_normal((5, places.size), dtype=np.float32)
    entropy, dlogp, dentropy = np.abs(drawn[0]), drawn[1] / 10, drawn[2] / 10
    logp = -np.abs(entropy + drawn[3]) - 0.01
    moved = (logp + eta * dlogp + eta**2 * drawn[4], entropy + eta * dentropy + eta**2 * drawn[4])
    first = (dlogp, dentropy, None, None, dlogp**2) if tangent else (None,) * 5
    return TokenStats(*(None if x is None else torch.from_numpy(x) for x in (*moved, *first)))


def table(batch, eta: float, tangent: bool):
    """What `measure` does around the model."""
    budget = TokenBudget("auto", torch.device("cpu"))

    def score(microbatch: Microbatch) -> TokenStats:
        return made_up(microbatch.places, eta, tangent)

    stats = in_rollout_order(walk(batch, budget, score, shared=True), batch.n_tokens, None)
    stats = blame_rollouts(stats, batch, budget, score)
    return replace(sequence_sums(stats, batch.response_offsets, group=batch.group), tokens=stats)


def with_curvature(base, plus, minus):
    tokens = with_second_order(base.tokens, plus.tokens, minus.tokens, ETA)
    ends = np.concatenate([[0], np.cumsum(base.n_tokens.astype(np.int64))])
    return replace(sequence_sums(tokens, ends, group=base.group), tokens=tokens)


def estimates(base, moved, reward) -> dict:
    """By name, every estimator of a probe, not yet called."""
    calls = {f"{name} slope": lambda name=name: e.slope(base, estimator=name) for name in ("causal", "exact", "mixed")}
    calls |= {f"{name} curvature": lambda name=name: e.curvature(base, estimator=name) for name in ("causal", "exact")}
    weights = ("sequence", "prefix")
    calls |= {f"importance, {name}": lambda name=name: e.importance(base, moved, weights=name) for name in weights}
    measured = e.importance(base, moved)
    return calls | {
        "importance diagnostics": lambda: e.importance_diagnostics(measured),
        "forecast with pass@1 and pass@4": lambda: e.forecast(base, {ETA: moved}, reward, pass_at_k=[1, 4]),
        "forecast on fixed prompts": lambda: e.forecast(base, {ETA: moved}, reward, pass_at_k=[4], prompts="fixed"),
        "audit": lambda: e.on_policy_audit(base),
        "slope with a horizon": lambda: e.slope(base, horizon=64),
        "by position": lambda: e.by_position(base),
        "by length": lambda: e.by_length(base),
        "by lag": lambda: e.by_lag(base),
        "coefficients of the gradient": lambda: token_coefficients(base, estimator="causal", per="token"),
    }


def written(base, reward) -> None:
    columns = rollout_rows.columns(base, reward, {"slope_causal": e.slope(base)}, [])
    with tempfile.TemporaryDirectory() as folder:
        run_folder._write_parquet(Path(folder, run_folder.ROLLOUTS), columns)


def seconds(call) -> tuple[float, object]:
    start = time.process_time()
    found = call()
    return round(time.process_time() - start, 2), found


def streamed(path: Path) -> dict:
    """In this process, everything from the file on."""
    anonymous = _Anonymous()
    took = {}
    took["reading"], batch = seconds(lambda: read_rollouts(path))
    took["base pass"], base = seconds(lambda: table(batch, 0.0, True))
    took["moved passes"], (moved, minus) = seconds(lambda: [table(batch, eta, False) for eta in (ETA, -ETA)])
    took["second differences"], base = seconds(lambda: with_curvature(base, moved, minus))
    calls = estimates(base, moved, batch.reward)
    took["estimates"] = sum(seconds(call)[0] for call in calls.values())
    took[run_folder.ROLLOUTS], _ = seconds(lambda: written(base, batch.reward))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return dict(seconds=took, generated_tokens=batch.n_tokens, peak_MiB=peak, anonymous_MiB=anonymous.stop())


class _Anonymous(threading.Thread):
    """The most that was in memory and not in a file, looked at twenty times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self._most, self._end = 0, threading.Event()
        self.start()

    def run(self):
        while not self._end.wait(0.05):
            said = Path("/proc/self/status").read_text()
            self._most = max(self._most, int(said.split("RssAnon:")[1].split()[0]))

    def stop(self) -> int:
        self._end.set()
        self.join()
        return self._most // 1024


def whole_path(rollouts: int, tokens: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rollouts.jsonl")
        write(path, rollouts, tokens)
        said = subprocess.run([sys.executable, __file__, "--file", path], capture_output=True, text=True, check=True)
        size = path.stat().st_size // MIB
    return dict(rollouts=rollouts, tokens=tokens, file_MiB=size, **json.loads(said.stdout))


def rows(rollouts: int, tokens: int = 8) -> dict:
    """The estimators on a table of so many rollouts."""
    ends, group = np.arange(rollouts + 1) * tokens, np.arange(rollouts) // PER_PROMPT
    places = np.arange(rollouts * tokens)
    base, moved, minus = (
        replace(sequence_sums(stats, ends, group=group), tokens=stats)
        for stats in (made_up(places, eta, eta == 0) for eta in (0.0, ETA, -ETA))
    )
    base = with_curvature(base, moved, minus)
    reward = np.random.default_rng(1).integers(0, 2, rollouts).astype(float)
    found = {name: seconds(call)[0] for name, call in estimates(base, moved, reward).items()}
    found[run_folder.ROLLOUTS] = seconds(lambda: written(base, reward))[0]
    return dict(rollouts=rollouts, tokens=tokens, seconds=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file is not None:
        print(json.dumps(streamed(options.file)))
        return
    found = dict(record(), whole_path=[], estimators=[])
    for name, function, sizes in (("estimators", rows, options.rows), ("whole_path", None, options.rollouts)):
        for size in sizes:
            found[name].append(whole_path(size, options.tokens) if function is None else function(size))
            print(json.dumps(found[name][-1], indent=2), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
