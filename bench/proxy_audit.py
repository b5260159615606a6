"""How far published proxies can be trusted: graded by exact shares, on the demo's policy and on SmolLM2-135M-Instruct.

    python bench/proxy_audit.py --out bench/results/statistics/proxy_audit.json

A policy-gradient step on rewarded rollouts, by plain SGD and by a fresh AdamW, judged on rollouts of other prompts. The
demo's policy answers 384 prompts 8 times for either purpose and is rewarded as in its task; the real one
(bench/real_policy.py) answers two sets of 16 questions 4 times in up to 24 tokens, and its reward is the share of an
answer's tokens that are distinct. An entry that the file has already is not made again. About 15 minutes of one core.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import real_policy
import torch
from machine import record

from dentropy import Policy, measure, policy_gradient_step, update_attribution
from dentropy.demo import run as demo
from dentropy.experiment import proxies
from dentropy.passes.slope_gradient import slope_gradient
from dentropy.passes.update_attribution import PARTS

OPTIMIZERS = ("sgd", "adamw")
JUDGES = "rain bees iron chess Rome salt owls tea glass snow bread Mars whales paper jazz gold"
MAKERS = "sand ants copper tennis Cairo sugar bats coffee stone wind cheese Venus seals ink opera tin"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file to write, and a table beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text()) if options.out.exists() else {"machine": record(), "policies": {}}
    for name, rollouts in {"the demo's": of_the_demo, "SmolLM2-135M": of_a_real_one}.items():
        if name not in found["policies"]:
            start = time.process_time()
            found["policies"][name] = graded(*rollouts()) | {"seconds": time.process_time() - start}
            options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    lines = table(found["policies"])
    options.out.with_suffix(".md").write_text(lines)
    print(lines)


def of_the_demo():
    """The policy, the rollouts that judge and those that make the step."""
    policy, tokenizer = demo.load_policy()
    return policy, *(demo.draw_rollouts(policy, tokenizer, 384, 8, seed=seed) for seed in (1, 2))


def of_a_real_one():
    model, tokenizer = real_policy.load()
    policy = Policy(model)
    judges, makers = (
        real_policy.draw_rollouts(policy, tokenizer, per_prompt=4, seed=seed, subjects=subjects.split())
        for seed, subjects in enumerate((JUDGES, MAKERS))
    )
    distinct = [len(set(makers.response(i))) / len(makers.response(i)) for i in range(len(makers))]
    return policy, judges, replace(makers, reward=np.array(distinct))


def graded(policy, batch, makers) -> dict:
    """The grades by each optimizer's step; one gradient of the entropy serves all."""
    found, gradient = {}, None
    for optimizer in OPTIMIZERS:
        step = policy_gradient_step(policy, makers, step_size=1e-5, optimizer=optimizer)
        sums = measure(policy, batch, step.direction(), keep_tokens=True)
        if gradient is None:
            gradient = slope_gradient(policy, batch, sums, list(step.gradient), parts=PARTS)
        shares = update_attribution(policy, batch, step, sums, gradient=gradient)
        found[optimizer] = {
            "reliability": shares.reliability,
            "tokens": int(shares.batch.n_tokens),
            "unexplained": shares.unexplained / shares.total,
            "proxies": proxies.entry(proxies.grades(step, shares, most=len(makers)), [], 1.0),
        }
    return {"judges": [len(batch), batch.n_groups], "makers": [len(makers), makers.n_groups], "steps": found}


def table(policies: dict) -> str:
    """Markdown."""
    heads = (
        "policy",
        "optimizer",
        "reliability of shares",
        "proxy",
        "rank correlation",
        "R²",
        "R², corrected",
        "same sign",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for policy, entry in policies.items():
        for optimizer, step in entry["steps"].items():
            for row in step["proxies"]:
                grades = (_shown(row["rank_correlation"]), _shown(row["r_squared"]))
                grades += (_shown(row["r_squared"], "corrected"), _shown(row["sign_agreement"]))
                cells = (policy, optimizer, f"{step['reliability']:.2f}", row["name"], *grades)
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(agreement: dict, which: str = "value") -> str:
    ends = agreement["interval" if which == "value" else f"{which}_interval"]
    value = agreement[which]
    return "–" if value is None else f"{value:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"


if __name__ == "__main__":
    main()
