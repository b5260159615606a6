"""How often 95% intervals cover, and what the verdicts are worth: policies with exact answers, sampled many times.

    python bench/coverage.py --out bench/results/statistics/coverage.json

Enumerable policies of the tests, 64 or 512 rollouts in 16 equal groups or in unequal ones of 1 to 16 rollouts, with
prompts drawn at random, or in 16 equal groups of fixed prompts. A line is one policy with one such set of rollouts,
measured at the η where the exact ESS is 95% or 80%. Prediction errors, verdicts and misses are given for the
measurement with sequence weights and for that with prefix weights, which is what `probe` shows; a prediction error
takes the slope that is the measurement's derivative. "warned, of misses" is the share of batches with a warning, and
that of those whose interval misses. Soft policies, whose intervals have to cover, are sampled twice as often. The
heavy-tailed one with 64 rollouts of fixed prompts comes again by how many of its rare answers a batch has. The same
lines, as tables, are written beside the JSON.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the policies with exact answers

from chains import tables_of_jets
from machine import record
from oracles import TinyPolicy

from dentropy.estimators import curvature, importance, importance_diagnostics, predict, prediction_error, slope
from dentropy.passes.noise_floor import DERIVATIVE


def favour_one(prefix: tuple[int, ...]) -> list[float]:
    """One token of four takes 98 draws of 100."""
    return [0.0, 0.0, 6.0, 0.0]


def some_long(prefix: tuple[int, ...]) -> list[float]:
    """Answers are short, but for those that begin with the rare token 2."""
    if not prefix:
        return [1.0, 0.0, -2.0]
    return [-3.0, 0.0, 0.0] if prefix[0] == 2 else [1.0, 0.0, 0.0]


POLICIES = {
    "soft": dict(n_prompts=64),
    "sharp": dict(n_prompts=64, scale=4.0),
    "heavy-tailed": dict(vocab=3, horizon=9, n_prompts=64, shift=some_long),
    "near-deterministic": dict(n_prompts=64, shift=favour_one),
}
UNEQUAL = [1, 2, 4, 6, 9, 12, 14, 16]  # 64 rollouts
GROUPS = {
    (64, "16 equal"): [4] * 16,
    (64, "8 unequal"): UNEQUAL,
    (512, "16 equal"): [32] * 16,
    (512, "64 unequal"): UNEQUAL * 8,
    (64, "16 fixed"): [4] * 16,
    (512, "16 fixed"): [32] * 16,
}
ESS = (0.95, 0.8)
SLOPES, CURVATURES, WEIGHTS = ("causal", "exact", "mixed"), ("exact", "causal"), ("sequence", "prefix")
VERDICTS = ("reliable", "strained", "unusable")
OFTEN = {"soft": 2}  # times --batches
RARE = ("0", "1", "2", "3 or more")  # answers that begin with the rare token
COLUMNS = {
    "policy": lambda row: row["policy"],
    "rollouts": lambda row: str(row["rollouts"]),
    "groups": lambda row: row["groups"],
    "slope: causal, exact, mixed": lambda row: shares(row["slope"], SLOPES),
    "causal slope warned, of misses": lambda row: warned(row["slope"]["causal"]),
    "curvature: exact, causal": lambda row: shares(row["curvature"], CURVATURES),
    "causal curvature warned, of misses": lambda row: warned(row["curvature"]["causal"]),
    "ESS": lambda row: f"{row['ess']:.0%}",
    "ΔH: sequence, prefix": lambda row: shares(row["measured"], WEIGHTS),
    "prefix ΔH warned, of misses": lambda row: warned(row["measured"]["prefix"]),
    "prediction error: sequence, prefix": lambda row: shares(row["prediction_error"], WEIGHTS),
    "prefix error warned, of misses": lambda row: warned(row["prediction_error"]["prefix"]),
    "sequence: reliable, strained, unusable": lambda row: verdicts(row, "sequence"),
    "misses of the reliable": lambda row: missed(row, "sequence"),
    "prefix: reliable, strained, unusable": lambda row: verdicts(row, "prefix"),
    "misses of these reliable": lambda row: missed(row, "prefix"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write, with the table beside it")
    parser.add_argument("--batches", type=int, default=400, help="for each line, of soft policies twice as many")
    options = parser.parse_args(arguments)
    rows, lines = [], head(COLUMNS)
    print(*lines, sep="\n")
    for name, settings in POLICIES.items():
        drawn, few = TinyPolicy(**settings), TinyPolicy(**settings | {"n_prompts": 16})
        for (rollouts, groups), sizes in GROUPS.items():
            policy, prompts = (few, "fixed") if "fixed" in groups else (drawn, "random")
            batches = options.batches * OFTEN.get(name, 1)
            for row in measured_lines(policy, sizes, prompts, batches):
                rows.append({"policy": name, "rollouts": rollouts, "groups": groups, "batches": batches, **row})
                lines.append(line(COLUMNS, rows[-1]))
                print(lines[-1], flush=True)
    by_rare = lines_by_rare_answers(options.batches)
    lines += [
        "",
        "The heavy-tailed policy, 64 rollouts of 16 fixed prompts, by their rare answers:",
        "",
        *head(BY_RARE),
    ]
    lines += [line(BY_RARE, row) for row in by_rare]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": record(), "rows": rows, "heavy_tailed_by_rare_answers": by_rare}
        options.out.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        many = ", ".join(f"{name}: {options.batches * OFTEN.get(name, 1):,}" for name in POLICIES)
        title = f"Share of batches ({many}) whose 95% intervals cover the exact value, by bench/coverage.py."
        options.out.with_suffix(".md").write_text("\n".join([title, "", *lines, ""]))


def head(columns: dict) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def line(columns: dict, row: dict) -> str:
    return "| " + " | ".join(cell(row) for cell in columns.values()) + " |"


def lines_by_rare_answers(batches: int) -> list[dict]:
    """The causal slope and ΔH with prefix weights at an ESS of 80%, by how many of `RARE` answers a batch has."""
    policy, sizes = TinyPolicy(**POLICIES["heavy-tailed"] | {"n_prompts": 16}), GROUPS[64, "16 fixed"]
    prompt, sequence = policy.sample(np.random.default_rng(0), 4 * batches, n_groups=16, prompts="fixed")
    rare = np.minimum((policy.tokens[sequence][..., 0] == 2).sum(1), 3)
    before, first, _ = policy.truth(0.0)
    eta = eta_of(policy, 0.8)
    base, moved = (tables(policy, prompt, sequence, sizes, at, order) for at, order in ((0.0, 1), (eta, 0)))
    slopes = [slope(sums, prompts="fixed") for sums in base]
    measured = [importance(b, m, weights="prefix", prompts="fixed") for b, m in zip(base, moved, strict=True)]
    found = []
    for count, name in enumerate(RARE):
        which = np.flatnonzero(rare == count)
        found.append({"rare_answers": name, "share": len(which) / len(rare)})
        found[-1]["slope"] = covered([slopes[i] for i in which], first)
        found[-1]["measured"] = covered([measured[i] for i in which], policy.truth(eta)[0] - before)
    return found


def eta_of(policy: TinyPolicy, ess: float) -> float:
    """The η > 0 at which the exact ESS, 1 / E[w²], falls to `ess`."""
    before = policy.columns(0.0)["logp"]

    def at(eta: float) -> float:
        return 1 / np.exp(2 * policy.token_jets(eta)[0][0].sum(-1) - before).sum(1).mean()

    low, high = 0.0, 1.0
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) > ess else (low, middle)
    return low


def measured_lines(policy: TinyPolicy, sizes: list[int], prompts: str, batches: int) -> list[dict]:
    """What is found with these groups, one entry for each η; fixed prompts are all that the policy has."""
    etas = [eta_of(policy, ess) for ess in ESS]
    prompt, sequence = policy.sample(
        np.random.default_rng(0), batches, n_groups=len(sizes), per_group=sizes, prompts=prompts
    )
    before, first, second = policy.truth(0.0)
    base = tables(policy, prompt, sequence, sizes, 0.0, order=2)
    slopes = {e: [slope(sums, estimator=e, prompts=prompts) for sums in base] for e in SLOPES}
    curvatures = {e: [curvature(sums, estimator=e, prompts=prompts) for sums in base] for e in CURVATURES}
    common = {
        "tokens": float(policy.lengths[sequence].mean()),
        "entropy": float(before),
        "slope": {e: covered(found, first) for e, found in slopes.items()},
        "curvature": {e: covered(found, second) for e, found in curvatures.items()},
    }
    rows = []
    for eta, ess in zip(etas, ESS, strict=True):
        moved, change = tables(policy, prompt, sequence, sizes, eta), policy.truth(eta)[0] - before
        pairs = list(zip(base, moved, strict=True))
        measured = {w: [importance(b, m, weights=w, prompts=prompts) for b, m in pairs] for w in WEIGHTS}
        errors = {
            w: [prediction_error(predict(s, eta), m) for s, m in zip(slopes[DERIVATIVE[w]], measured[w], strict=True)]
            for w in WEIGHTS
        }
        row = common | {"ess": ess, "eta": eta, "change": float(change)}
        row["measured"] = {w: covered(values, change) for w, values in measured.items()}
        row["prediction_error"] = {w: covered(values, eta * first - change) for w, values in errors.items()}
        row |= by_verdict(measured, change)
        rows.append(row)
    return rows


def by_verdict(measured: dict[str, list], change: float) -> dict[str, dict]:
    """By the measurement's weights: the share of each verdict, and of the reliable ones those that miss."""
    shares_of, missed_of = {}, {}
    for weights, values in measured.items():
        found = [importance_diagnostics(m).verdict for m in values]
        trusted = [m for m, verdict in zip(values, found, strict=True) if verdict == "reliable"]
        shares_of[weights] = {v: found.count(v) / len(found) for v in VERDICTS}
        missed_of[weights] = 1 - covered(trusted, change)["covered"] if trusted else None
    return {"verdicts": shares_of, "missed": missed_of}


def tables(policy: TinyPolicy, prompt, sequence, sizes: list[int], eta: float, order: int = 0) -> list:
    """The table of every batch at η, with its tokens."""
    batches, group = len(prompt), np.repeat(np.arange(len(sizes)), sizes)
    prompt, sequence = prompt.ravel(), sequence.ravel()
    keep = policy.mask[sequence]
    logp, entropy = (jets[:, prompt, sequence][:, keep] for jets in policy.token_jets(eta))
    found = tables_of_jets(logp, entropy, policy.lengths[sequence], 1, batches, order)
    return [dataclasses.replace(sums, group=group) for sums in found]


def covered(estimates: list, truth: float) -> dict[str, float | None]:
    """The share whose interval covers, the share with a warning, that of those that miss, and what covers without."""
    ends = np.array([estimate.interval() for estimate in estimates])
    inside = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    warned = np.array([bool(estimate.warnings) for estimate in estimates])
    return {
        "covered": float(inside.mean()),
        "warned": float(warned.mean()),
        "missed_warned": None if inside.all() else float(warned[~inside].mean()),
        "covered_without_warning": None if warned.all() else float(inside[~warned].mean()),
    }


def shares(found: dict[str, dict], names: tuple[str, ...]) -> str:
    return ", ".join(f"{found[name]['covered']:.3f}" for name in names)


def warned(found: dict) -> str:
    share = found["missed_warned"]
    return f"{found['warned']:.0%}, " + ("–" if share is None else f"{share:.0%}")


BY_RARE = {
    "rare answers": lambda row: row["rare_answers"],
    "of all batches": lambda row: f"{row['share']:.1%}",
    "causal slope": lambda row: f"{row['slope']['covered']:.3f}",
    "warned": lambda row: f"{row['slope']['warned']:.0%}",
    "prefix ΔH at ESS 80%": lambda row: f"{row['measured']['covered']:.3f}",
    "warned there": lambda row: f"{row['measured']['warned']:.0%}",
}


def verdicts(row: dict, weights: str) -> str:
    return ", ".join(f"{row['verdicts'][weights][v]:.0%}" for v in VERDICTS)


def missed(row: dict, weights: str) -> str:
    share = row["missed"][weights]
    return "–" if share is None else f"{share:.0%}"


if __name__ == "__main__":
    main()
