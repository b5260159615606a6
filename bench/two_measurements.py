"""Sequence against prefix weights, exact against causal curvature, policy by policy and length by length.

    python bench/two_measurements.py --out bench/results/statistics/two_measurements.json

Policies of the tests, whose entropies are known at every η, are sampled many times: batches of 16 groups of 8 rollouts
for prompts drawn at random. A line is one policy: how many times more variance the exact curvature and the
sequence-weighted measurement have, how often 95% intervals cover, and up to which η most batches are called reliable.
η is in units in which ℓ', the derivative of a rollout's log-probability, has root mean square 1, so that the ESS of
sequence weights is near exp(-η²). The demo's policy comes last, with one batch: there variances are squared standard
errors, and what covers is not known.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the policies with exact answers

from chains import ChainPolicy, tables_of_jets
from oracles import TinyPolicy

from dentropy import curvature, importance, importance_diagnostics, measure
from dentropy.demo.run import draw_rollouts, load_policy
from dentropy.passes.policy_gradient import policy_gradient_direction

GROUPS, PER_GROUP = 16, 8
WEIGHTS, CURVATURES = ("sequence", "prefix"), ("exact", "causal")
REACH = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
AT = 0.35  # the η of the table's variances and coverages: an ESS of nine tenths
MOST_TOKENS = 8_000_000  # of a policy: its values are held at once
CHAINS = {
    "chain, 8 tokens at most": dict(horizon=8, end=-3.0),
    "chain, 31": dict(horizon=31, end=-4.0),
    "chain, 128": dict(horizon=128, end=-5.5),
    "chain, 512": dict(horizon=512, end=-7.0),
    "chain, 31, shortened by the move": dict(horizon=31, end=-3.0, end_drift=1.0),
    "chain, 31, sharp": dict(horizon=31, end=-6.0, scale=3.0),
}
COLUMNS = {
    "policy": lambda row: row["policy"],
    "tokens a rollout": lambda row: f"{row['tokens']:.1f}",
    "R'': variance ratio": lambda row: f"{row['curvature']['variance_ratio']:.1f}",
    "coverage, exact and causal": lambda row: pair(row["curvature"]["coverage"], ".3f"),
    f"ΔH at {AT}: variance ratio": lambda row: f"{at(row)['variance_ratio']:.1f}",
    "coverage, sequence and prefix": lambda row: pair(at(row)["coverage"], ".3f"),
    "reliable up to η": lambda row: pair(row["reliable_until"], "g"),
    "coverage there": lambda row: pair(row["coverage_there"], ".3f"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--batches", type=int, default=400, help="for each policy, fewer of long ones")
    parser.add_argument("--judged", type=int, default=60, help="of these, how many get a verdict at each η")
    options = parser.parse_args(arguments)
    rows = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name, make in policies(options.batches).items():
        rows.append({"policy": name, **line(*make(), options.judged)})
        print("| " + " | ".join(cell(rows[-1]) for cell in COLUMNS.values()) + " |", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"groups": GROUPS, "per_group": PER_GROUP, "batches": options.batches, "judged": options.judged}
        options.out.write_text(json.dumps(settings | {"rows": rows}, indent=1, allow_nan=False) + "\n")


def policies(batches: int) -> dict:
    """For each policy what makes (tables at η up to an order, R and its derivatives at η or None where not known)."""
    found = {"enumerable": lambda: enumerable(TinyPolicy(), batches)}
    for name, settings in CHAINS.items():
        found[name] = lambda settings=settings: chain(ChainPolicy(**settings), batches)
    return found | {"the demo's": demo}


def enumerable(policy: TinyPolicy, batches: int):
    drawn = policy.sample(np.random.default_rng(0), batches, n_groups=GROUPS, per_group=PER_GROUP)
    prompt, sequence = (indices.reshape(-1) for indices in drawn)
    keep = policy.mask[sequence]

    def tables(eta: float, order: int):
        logp, entropy = (jets[:, prompt, sequence][:, keep] for jets in policy.token_jets(eta))
        return tables_of_jets(logp, entropy, policy.lengths[sequence], PER_GROUP, batches, order)

    return tables, policy.truth


def chain(policy: ChainPolicy, batches: int):
    batches = min(batches, MOST_TOKENS // (GROUPS * PER_GROUP * policy.horizon))
    rollouts = policy.sample(np.random.default_rng(0), batches * GROUPS * PER_GROUP, PER_GROUP)
    return lambda eta, order: rollouts.tables(eta, batches, order), policy.truth


def demo():
    """One batch of the demo's policy, along the step of its policy gradient."""
    policy, tokenizer = load_policy()
    batch, update = (draw_rollouts(policy, tokenizer, 256, 8, seed=seed) for seed in (0, 1))
    direction = policy_gradient_direction(policy, update, step_size=1e-4)

    def tables(eta: float, order: int):
        return [measure(policy, batch, direction, eta=eta, order=order, keep_tokens=True)]

    return tables, None


def line(tables, truth, judged: int, reach: tuple[float, ...] = REACH, prompts: str = "random") -> dict:
    """What is known of one policy; `by_eta` has an entry for each η."""
    base = tables(0.0, 2)
    scale = 1 / np.sqrt(np.mean([np.mean(sums.dlogp**2) for sums in base]))
    before, _, second = (None,) * 3 if truth is None else truth(0.0)
    row = {
        "batches": len(base),
        "tokens": float(np.mean([sums.n_tokens.mean() for sums in base])),
        "scale": float(scale),
        "curvature": compared(
            {e: [curvature(sums, estimator=e, prompts=prompts) for sums in base] for e in CURVATURES}, second
        ),
        "by_eta": [],
    }
    for eta in reach:
        moved = tables(float(eta * scale), 0)
        measured = {
            w: [importance(b, m, weights=w, prompts=prompts) for b, m in zip(base, moved, strict=True)] for w in WEIGHTS
        }
        change = None if truth is None else truth(eta * scale)[0] - before
        verdicts = {w: [importance_diagnostics(m).verdict for m in ms[:judged]] for w, ms in measured.items()}
        entry = {"eta": eta, **compared(measured, change)}
        entry["ess"] = {w: float(np.median([m.ess_fraction for m in ms])) for w, ms in measured.items()}
        entry["reliable"] = {w: found.count("reliable") / len(found) for w, found in verdicts.items()}
        row["by_eta"].append(entry)
    last = {w: last_reliable(row["by_eta"], w) for w in WEIGHTS}
    row["reliable_until"] = {w: entry and entry["eta"] for w, entry in last.items()}
    row["coverage_there"] = {w: entry and entry["coverage"][w] for w, entry in last.items()}
    return row


def compared(estimates: dict, truth: float | None) -> dict:
    """Variance of the first form over that of the second, and the bias, deviation and coverage of both."""
    found = {"variance_ratio": None, "bias": {}, "deviation": {}, "coverage": {}}
    for form, values in estimates.items():
        value = np.array([e.value for e in values])
        found["deviation"][form] = float(value.std(ddof=1) if len(value) > 1 else values[0].stderr)
        found["bias"][form] = None if truth is None else float(value.mean() - truth)
        ends = np.array([e.interval() for e in values])
        covered = None if truth is None else float(np.mean((ends[:, 0] < truth) & (truth < ends[:, 1])))
        found["coverage"][form] = covered
    first, second = found["deviation"].values()
    return found | {"variance_ratio": (first / second) ** 2}


def last_reliable(by_eta: list[dict], weights: str) -> dict | None:
    """The entry of the largest η up to which most verdicts are reliable."""
    last = None
    for entry in by_eta:
        if entry["reliable"][weights] <= 0.5:
            break
        last = entry
    return last


def at(row: dict) -> dict:
    return next(entry for entry in row["by_eta"] if entry["eta"] == AT)


def pair(values: dict, form: str) -> str:
    return ", ".join("–" if value is None else format(value, form) for value in values.values())


if __name__ == "__main__":
    main()
