"""Rollouts of a policy some steps old against fresh ones, on the demo's task.

    python bench/stale_policy.py --out bench/results/statistics/stale_policy.json

The demo's policy takes 8 AdamW steps of its policy gradient, each on rollouts of its own. After 0, 1, 2, 4 and 8 of
them the rollouts of the policy before the first, with what it gave their tokens as `sampler_logp`, stand for the
policy's own: the entropy, its slope along the next step and its change, the slopes of reward and length. Each is set
beside the estimate that fresh rollouts give, as many answers to other prompts, with its distance in standard errors of
the difference; and so are the estimates without weights. Some minutes on one thread.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import record

from dentropy import Direction, forecast, importance, measure, slope
from dentropy.demo.run import draw_rollouts, load_policy
from dentropy.estimators import Statistic, base_weights, importance_diagnostics, on_policy_audit
from dentropy.experiment.probe import entropy_per_token
from dentropy.passes.policy_gradient import policy_gradient_step

STALE = (0, 1, 2, 4, 8)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--prompts", type=int, default=256, help="prompts of 8 rollouts each")
    parser.add_argument("--step-size", type=float, default=1e-4, help="the learning rate")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    policy, tokenizer = load_policy()

    def drawn(seed: int, per_prompt: int = 8):
        return draw_rollouts(policy, tokenizer, options.prompts, per_prompt, seed=seed)

    old = drawn(1000)
    logp = measure(policy, old, keep_tokens=True).tokens.logp.double().numpy()
    stale, rows = replace(old, sampler_logp=logp), []
    model = policy.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.step_size, weight_decay=0.0)
    for steps in range(max(STALE) + 1):
        gradient = policy_gradient_step(policy, drawn(steps), step_size=options.step_size).gradient
        for name, parameter in model.named_parameters():
            parameter.grad = gradient.get(name)
        direction = Direction.from_optimizer_step(model, optimizer)
        if steps in STALE:
            fresh = estimates(policy, drawn(2000 + steps), direction)
            row = {"steps": steps, **weights(policy, stale, direction)}
            row["reweighted"] = against(estimates(policy, stale, direction), fresh)
            row["as they are"] = against(estimates(policy, old, direction), fresh)
            rows.append(row)
            print(json.dumps(row, indent=1, ensure_ascii=False), flush=True)
        optimizer.step()
    print(f"{time.perf_counter() - start:.0f} s")
    if options.out:
        settings = {"machine": record(), "rollouts": len(old), "step_size": options.step_size}
        options.out.write_text(
            json.dumps({**settings, "rows": rows}, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        )


def estimates(policy, batch, direction) -> dict[str, tuple[float, float]]:
    """(value, standard error) by name."""
    eta = direction.step_size
    base = measure(policy, batch, direction, keep_tokens=True)
    moved = measure(policy, batch, direction, eta=eta, keep_tokens=True)
    entropy, influence = entropy_per_token(base)
    causal = slope(base)
    found: dict[str, Statistic] = {"causal slope": causal, "exact slope": slope(base, estimator="exact")}
    found |= {f"ΔH, {form} weights": importance(base, moved, weights=form) for form in ("prefix", "sequence")}
    gains = forecast(base, {}, batch.reward)
    found |= {"reward slope": gains.reward.slope, "length slope": gains.length.slope}
    known = {"entropy": (entropy, causal.groups.stderr(influence)[0])}
    return known | {name: (statistic.value, statistic.stderr) for name, statistic in found.items()}


def against(
    found: dict[str, tuple[float, float]], fresh: dict[str, tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """Each estimate beside the fresh one, and their difference in its standard errors: the two share no rollout."""
    rows = {}
    for name, (value, stderr) in found.items():
        other, error = fresh[name]
        apart = (value - other) / (stderr**2 + error**2) ** 0.5
        rows[name] = {"value": value, "stderr": stderr, "fresh": other, "fresh_stderr": error, "apart": apart}
    return rows


def weights(policy, batch, direction) -> dict[str, float | str | None]:
    """What base weights and audit say."""
    base = measure(policy, batch, direction, keep_tokens=True)
    found = base_weights(base)
    judged = importance_diagnostics(found)
    return {
        "ess_fraction": found.ess_fraction,
        "khat": judged.khat,
        "mean_weight": found.mean_weight,
        "verdict": judged.verdict,
        "audit": on_policy_audit(base).warnings,
    }


if __name__ == "__main__":
    main()
