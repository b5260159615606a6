"""The comparison of bench/two_measurements.py on a real policy, SmolLM2-135M-Instruct (bench/real_policy.py).

    python bench/two_measurements_real.py --out bench/results/statistics/two_measurements_real.json
    python bench/two_measurements_real.py --per-prompt 6 --tokens 64 --out two_measurements_real_64.json

One batch of 4 answers of up to 48 tokens to each of 8 questions, along the policy gradient of 16 others, rewarded for
the share of their tokens that are distinct. Variances are squared standard errors on these very prompts; what covers is
not known. About four minutes on one thread.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from real_policy import draw_rollouts, load
from two_measurements import COLUMNS, line

from dentropy import Policy, measure
from dentropy.passes.policy_gradient import policy_gradient_direction

REACH = (0.35, 0.7, 1.0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--per-prompt", type=int, default=4, help="answers to each question")
    parser.add_argument("--tokens", type=int, default=48, help="at most in an answer")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    model, tokenizer = load()
    policy = Policy(model)
    batch = draw_rollouts(policy, tokenizer, per_prompt=options.per_prompt, max_new_tokens=options.tokens, seed=0)
    update = draw_rollouts(policy, tokenizer, per_prompt=2, max_new_tokens=24, seed=1)
    distinct = [len(set(update.response(i))) / len(update.response(i)) for i in range(len(update))]
    update = replace(update, reward=np.array(distinct))
    direction = policy_gradient_direction(policy, update, step_size=1e-6)

    def tables(eta: float, order: int):
        return [measure(policy, batch, direction, eta=eta, order=order, keep_tokens=True)]

    row = {"policy": "SmolLM2-135M", **line(tables, None, judged=1, reach=REACH, prompts="fixed")}
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    print("| " + " | ".join(column(row) for column in COLUMNS.values()) + " |")
    for entry in row["by_eta"]:
        print({name: entry[name] for name in ("eta", "variance_ratio", "ess", "reliable")})
    print(f"{time.perf_counter() - start:.0f} s")
    if options.out:
        options.out.write_text(json.dumps({"rollouts": len(batch), "rows": [row]}, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
