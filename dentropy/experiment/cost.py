"""What a probe costs: its passes, and how many plain forward passes they come to."""

from __future__ import annotations

from dentropy.experiment.proxies import graded_rollouts
from dentropy.passes.noise_floor import sampled_rollouts
from dentropy.passes.slope_gradient import prompt_parts
from dentropy.passes.update_attribution import PARTS, noise_rollouts
from dentropy.rollouts.batch import PackedBatch

# In passes without tangents, on a CPU: 2.9 and 2.8 for the demo's policy, 3.0 with tangents for a 57M model.
TANGENT, REVERSE = 3, 3


def cost(
    batch: PackedBatch,
    n_etas: int,
    own_steps: int,
    parameters: bool,
    update: PackedBatch | None = None,
    groups: int = 0,
) -> dict[str, int]:
    """`cost` of results.json: passes by kind, and the response tokens they run.

    Args:
        batch: the rollouts.
        n_etas: where a change is measured.
        own_steps: passes that only the second derivatives need, 0 or 2.
        parameters: whether a reverse pass gives their shares.
        update: rollouts whose tokens' shares a pass with tangents gives, after the same reverse pass, and their noise
            one over some of them, where the rollouts are of more than one prompt; a plain one over some grades proxies.
        groups: tokens that run for groups of these tokens.
    """
    passes = {"forward": n_etas + own_steps, "tangent": 1, "reverse": int(parameters or update is not None)}
    sample = int(batch.response_lens[sampled_rollouts(batch)].sum())
    tokens = sum(passes.values()) * int(batch.n_tokens) + sample
    if update is None:
        return passes | {"noise_floor": sample, "tokens": tokens}
    lots = noise_rollouts(update, sum(1 for _ in prompt_parts(batch, PARTS)))
    shares = update.n_tokens + sum(int(update.response_lens[rollouts].sum()) for rollouts in lots)
    graded = int(update.response_lens[graded_rollouts(update)].sum())
    more = {"update": shares, "groups": groups, "proxies": graded}
    return passes | {"noise_floor": sample} | more | {"tokens": tokens + sum(more.values())}


def forward_passes(found: dict[str, int], n_tokens: int) -> dict[str, float]:
    """The parts of `cost` in plain forward passes over the rollouts, which have `n_tokens`.

    Example:
        >>> found = {"forward": 5, "tangent": 1, "reverse": 1, "noise_floor": 50, "update": 200, "tokens": 950}
        >>> forward_passes(found, 100)
        {'forward': 5.0, 'tangent': 3.0, 'reverse': 3.0, 'noise_floor': 0.5, 'update': 6.0}
    """
    passes = {
        "forward": float(found["forward"]),
        "tangent": float(TANGENT * found["tangent"]),
        "reverse": float(REVERSE * found["reverse"]),
        "noise_floor": found["noise_floor"] / n_tokens,
    }
    weights = {"update": TANGENT, "groups": TANGENT, "proxies": 1}  # of groups in reverse mode and with tangents
    return passes | {name: weight * found[name] / n_tokens for name, weight in weights.items() if name in found}


def cost_text(content: dict) -> str | None:
    """The cost in words; None for a run of a version that did not count."""
    found = content.get("cost")
    if found is None:
        return None
    passes = found["forward"] + found["tangent"] + found["reverse"]
    share = found["noise_floor"] / content["n_tokens"]
    more = f", {found['update']:,} tokens of the update's with tangents" if found.get("update") else ""
    more += f", {found['groups']:,} tokens for groups of these" if found.get("groups") else ""
    return (
        f"{passes} passes over the rollouts{more} and {share:.0%} of one for the noise floors, "
        f"{found['tokens']:,} tokens in all, "
        f"about {sum(forward_passes(found, content['n_tokens']).values()):.0f} plain forward passes"
    )
