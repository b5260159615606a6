"""Does λ* hold entropy where it is? Real steps of the demo's policy, beside fixed coefficients of the usual bonus.

    python bench/entropy_control.py --out bench/results/statistics/entropy_control.json

Every arm takes the same number of AdamW steps of the policy gradient from the demo's policy. "λ*" adds, at each step,
the exact gradient of the entropy with the coefficient by which `bonus_for`, on other rollouts, predicts the entropy of
the start; "none" adds nothing; the others add a fixed coefficient of the usual bonus, the mean of the entropies at the
tokens that were sampled. Entropy is judged on rollouts drawn anew. An arm that the file has already is not run again.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from dentropy import PolicyLoss, bonus_for, entropy_gradient, measure, policy_gradient_step
from dentropy.demo.run import draw_rollouts, load_policy
from dentropy.estimators.groups import Groups
from dentropy.experiment.probe import entropy_per_token

COEFFICIENTS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
PER_PROMPT = 8


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file to write, and a figure beside it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--prompts", type=int, default=64, help="of each step's rollouts, for either purpose")
    parser.add_argument(
        "--judges", type=int, default=1024, help="prompts whose rollouts judge the first and last entropy"
    )
    parser.add_argument("--arms", nargs="+", default=["λ*", "none", *map(str, COEFFICIENTS)])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = {name: getattr(options, name) for name in ("steps", "lr", "prompts", "judges")}
    found = {"settings": settings, "arms": {}}
    if options.out.exists():
        found = json.loads(options.out.read_text())
        if found["settings"] != settings:
            parser.error(f"--out: {options.out} has other settings, {found['settings']}")
    for arm in options.arms:
        if arm not in found["arms"]:
            found["arms"][arm] = run(arm, options)
            options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(line(arm, found["arms"][arm]), flush=True)
    draw(found["arms"], options.out.with_suffix(".png"))


def run(arm: str, options) -> dict:
    """The entropies of one arm before, on the way and after, and its coefficients."""
    start, (policy, tokenizer) = time.perf_counter(), load_policy()
    optimizer = torch.optim.AdamW(policy.model.named_parameters(), lr=options.lr, weight_decay=0.0)
    loss = PolicyLoss(entropy_bonus=0.0 if arm in ("λ*", "none") else float(arm))

    def entropy(n_prompts: int, seed: int):
        batch = draw_rollouts(policy, tokenizer, n_prompts, PER_PROMPT, seed=seed)
        value, influence = entropy_per_token(measure(policy, batch))
        return batch, value, Groups.of(batch.group).stderr(influence)[0]

    _, first, first_stderr = entropy(options.judges, seed=10**6)
    way, coefficients = [], []
    for k in range(options.steps):
        batch, now, _ = entropy(options.prompts, seed=2 * k)
        update = draw_rollouts(policy, tokenizer, options.prompts, PER_PROMPT, seed=2 * k + 1)
        state = optimizer.state_dict() if k else None
        step = policy_gradient_step(policy, update, step_size=options.lr, loss=loss, optimizer_state=state)
        if arm == "λ*":
            held = bonus_for(first - now, policy, batch, step, entropy_gradient(policy, update))
            step, coefficient = held.step, held.coefficient.value
        else:
            coefficient = loss.entropy_bonus
        for name, parameter in policy.model.named_parameters():
            parameter.grad = step.gradient[name]
        optimizer.step()
        way.append(now)
        coefficients.append(coefficient)
    rollouts, last, last_stderr = entropy(options.judges, seed=10**6 + 1)
    return {
        "first": first,
        "first_stderr": first_stderr,
        "way": way,
        "coefficients": coefficients,
        "last": last,
        "last_stderr": last_stderr,
        "reward": float(rollouts.reward.mean()),
        "seconds": time.perf_counter() - start,
    }


def line(arm: str, row: dict) -> str:
    change = row["last"] / row["first"] - 1
    stderr = (row["last_stderr"] ** 2 + row["first_stderr"] ** 2) ** 0.5 / row["first"]
    return f"{arm:>8}: entropy {row['last']:.4f}, {change:+.2%} ± {stderr:.2%}, reward {row['reward']:.3f}"


def draw(arms: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for arm, row in arms.items():
        style = {"color": "black", "linewidth": 2.5} if arm == "λ*" else {"linewidth": 1}
        axes.plot([*row["way"], row["last"]], label=arm, **style)
    axes.axhline(next(iter(arms.values()))["first"], color="grey", linestyle=":")
    axes.set(xlabel="step", ylabel="entropy, nats per token")
    axes.legend(title="coefficient", fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
