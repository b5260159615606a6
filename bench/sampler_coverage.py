"""How often 95% intervals cover on rollouts of another sampler: every estimate, 1,000 batches of 16 and 64 prompts.

    python bench/sampler_coverage.py --out bench/results/statistics/sampler_coverage.json

The enumerable policy of the tests, whose answers are known exactly, with 8 rollouts of each prompt drawn at a
temperature of 1.25 ("hotter") or by a policy some steps old ("older"). `bias` is the mean less the truth in standard
deviations of one estimate; chance moves it by 1/√batches and a coverage by 0.7%. Some minutes on one thread.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from machine import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the policies with exact answers

from samplers import ETA, RIGHT, drawn_by, statistics

SAMPLERS, GROUPS = ("hotter", "older"), (16, 64)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--batches", type=int, default=1000, help="for each line")
    options = parser.parse_args(arguments)
    rows = []
    for name in SAMPLERS:
        for n_groups in GROUPS:
            rows.append({"sampler": name, "groups": n_groups, **covered(name, n_groups, options.batches)})
            print(json.dumps(rows[-1], indent=1, ensure_ascii=False), flush=True)
    if options.out:
        content = {"machine": record(), "batches": options.batches, "per_group": 8, "rows": rows}
        options.out.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def covered(name: str, n_groups: int, batches: int) -> dict:
    """Coverage and bias of each estimate, and the mean ESS of the base weights."""
    found: dict[str, list] = {}
    fractions = []
    for (prompt, sequence), tables in drawn_by(name, batches, n_groups, etas=(0.0, ETA), seed=3):
        weight = np.exp(tables[0].logp - tables[0].sampler_logp)
        fractions.append(weight.sum() ** 2 / (weight**2).sum() / weight.size)
        for what, estimate, truth in statistics(*tables, RIGHT[prompt, sequence].astype(float)):
            found.setdefault(what, []).append((estimate.value, *estimate.interval(), truth))
    estimates = {}
    for what, values in found.items():
        value, low, high, truth = np.array(values).T
        bias = (value - truth).mean() / value.std(ddof=1)
        estimates[what] = {"covered": float(((low < truth) & (truth < high)).mean()), "bias": float(bias)}
    return {"ess_fraction": float(np.mean(fractions)), "estimates": estimates}


if __name__ == "__main__":
    main()
