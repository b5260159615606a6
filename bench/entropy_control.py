"""Does λ* hold entropy where it is? Real steps of the demo's policy, beside fixed coefficients of the usual bonus.

    python bench/entropy_control.py --out bench/results/statistics/entropy_control.json

Every arm takes the same number of AdamW steps of the policy gradient from the demo's policy. "λ* per token" and "λ* per
sequence" add, at each step, the exact gradient of that entropy with the coefficient by which `bonus_for`, on other
rollouts, predicts the step to close a part of the gap to the entropy of the start; "none" adds nothing; the others add
a fixed coefficient of the usual bonus, the mean of the entropies at the tokens that were sampled. Entropy is judged
before and after on answers to the same prompts, drawn with the same random numbers: standard errors are those of the
change, paired by prompt. An arm that the file has already is not run again. About 20 minutes of one core.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from machine import record

from dentropy import PolicyLoss, SequenceSums, bonus_for, entropy_gradient, measure, policy_gradient_step
from dentropy.demo.run import draw_rollouts, load_policy
from dentropy.estimators.columns import PER, entropy_ratio
from dentropy.estimators.groups import Groups
from dentropy.estimators.reweighting import FORM

HELD = {f"λ* per {per}": per for per in PER}
COEFFICIENTS = (1e-2, 3e-2, 5e-2, 0.1, 0.15, 0.2, 0.3, 1.0)
ARMS = (*HELD, "none", *map(str, COEFFICIENTS))
PER_PROMPT, JUDGED = 8, 10**6
LOOKED_AT = 5  # of other arms every fifth step
ALLOWED = 0.02  # of the target


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file to write, and a figure beside it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--prompts", type=int, default=32, help="of each step's rollouts, for either purpose")
    parser.add_argument("--levels", type=int, default=96, help="more prompts whose answers say how high entropy is now")
    parser.add_argument("--gain", type=float, default=0.3, help="the part of the gap that λ* is to close in a step")
    parser.add_argument("--judges", type=int, default=1280, help="prompts whose answers judge before and after")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = {name: getattr(options, name) for name in ("steps", "lr", "prompts", "levels", "gain", "judges")}
    found = {"settings": settings, "machine": record(), "arms": {}}
    if options.out.exists():
        found = json.loads(options.out.read_text())
        if found["settings"] != settings:
            parser.error(f"--out: {options.out} has other settings, {found['settings']}")
    first = None
    for arm in options.arms:
        if arm not in found["arms"]:
            first = judged(load_policy(), options) if first is None else first
            found["arms"][arm] = run(arm, options, first)
            options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(line(arm, found["arms"][arm]), flush=True)
    draw(found["arms"], options.out.with_suffix(".png"))


def judged(loaded, options) -> SequenceSums:
    """The table of the judges' rollouts."""
    return measure(loaded[0], draw_rollouts(*loaded, options.judges, PER_PROMPT, seed=JUDGED))


def run(arm: str, options, first: SequenceSums) -> dict:
    """The entropies of one arm before, on the way and after, and its coefficients."""
    start, (policy, tokenizer) = time.process_time(), load_policy()
    optimizer = torch.optim.AdamW(policy.model.named_parameters(), lr=options.lr, weight_decay=0.0)
    per = HELD.get(arm)
    loss = PolicyLoss(entropy_bonus=0.0 if per or arm == "none" else float(arm))
    way, coefficients = [], []

    def drawn(n_prompts: int, seed: int):
        return draw_rollouts(policy, tokenizer, n_prompts, PER_PROMPT, seed=seed)

    for k in range(options.steps):
        update = drawn(options.prompts, 3 * k)
        step = policy_gradient_step(
            policy, update, step_size=options.lr, loss=loss, optimizer_state=optimizer.state_dict() if k else None
        )
        coefficient = loss.entropy_bonus
        if per or k % LOOKED_AT == 0:
            batches = update, drawn(options.levels, 3 * k + 1)
            table = SequenceSums.concatenate([measure(policy, batch) for batch in batches])
            way.append({"step": k, **{name: entropy(table, name)[0] for name in PER}})
        if per:
            batch = drawn(options.prompts, 3 * k + 2)
            gap = options.gain * (entropy(first, per)[0] - entropy(table, per)[0])
            held = bonus_for(gap, policy, batch, step, entropy_gradient(policy, update, per=per), per=per)
            step, coefficient = held.step, held.coefficient.value
        for name, parameter in policy.model.named_parameters():
            parameter.grad = step.gradient[name]
        optimizer.step()
        coefficients.append(coefficient)
    last = judged((policy, tokenizer), options)
    return {
        **{per: change(first, last, per) for per in PER},
        "way": way,
        "coefficients": coefficients,
        "tokens_per_answer": float(last.n_tokens.mean()),
        "seconds": time.process_time() - start,
    }


def entropy(sums: SequenceSums, per: str) -> tuple[float, np.ndarray]:
    """The entropy in nats per token (or sequence), and its influence values."""
    ratio = entropy_ratio(sums, per, FORM["causal"])
    return float(ratio.mean), ratio.centred / ratio.total


def change(first: SequenceSums, last: SequenceSums, per: str) -> dict[str, float]:
    """From the first entropy to the last, with the standard errors of the last and, paired, of the change."""
    (before, away), (after, influence) = entropy(first, per), entropy(last, per)
    paired = Groups.of_two(last.group, first.group, "random").stderr(np.concatenate([influence, -away]))[0]
    return {
        "first": before,
        "last": after,
        "last_stderr": Groups.of(last.group).stderr(influence)[0],
        "change": after / before - 1,
        "change_stderr": paired / before,
    }


def line(arm: str, row: dict) -> str:
    said = (f"{row[per]['change']:+.2%} ± {row[per]['change_stderr']:.2%} per {per}" for per in PER)
    return f"{arm:>15}: entropy {', '.join(said)}; {row['seconds']:.0f} CPU seconds"


def draw(arms: dict, path: Path) -> None:
    """Entropy against steps, as a part of the first, one panel for each normalization."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = dict(
        zip(map(str, COEFFICIENTS), colormaps["viridis"](np.linspace(0, 0.9, len(COEFFICIENTS))), strict=True)
    )
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, per in zip(figure.subplots(1, 2), PER, strict=True):
        axes.axhspan(-100 * ALLOWED, 100 * ALLOWED, color="0.9")
        for arm, row in arms.items():
            steps = [*(each["step"] for each in row["way"]), len(row["coefficients"])]
            values = np.array([*(each[per] for each in row["way"]), row[per]["last"]])
            held = HELD.get(arm) == per
            style = dict(zorder=3, linewidth=2.5 if held else 1.2) if arm in HELD else dict(linewidth=1)
            style["linestyle"] = {"none": ":", "λ* per sequence": "--"}.get(arm, "-")
            colour = colours.get(arm, "black")
            axes.plot(steps, 100 * (values / row[per]["first"] - 1), label=arm, color=colour, **style)
        axes.set(xlabel="step", ylabel=f"entropy per {per}, % away from that of the start")
        axes.set_xticks(range(0, len(row["coefficients"]) + 1, LOOKED_AT))
    axes.legend(title="coefficient", fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
