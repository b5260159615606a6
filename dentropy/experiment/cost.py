"""What a probe costs: its passes, and how many plain forward passes they come to."""

from __future__ import annotations

from dentropy.passes.noise_floor import sampled_rollouts
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
        update: rollouts whose tokens' shares two passes with tangents give, after the same reverse pass.
        groups: of these tokens, each of which takes a reverse pass over the update's rollouts and a pass with tangents.

    Proxies of the update's shares take a plain pass over its rollouts.
    """
    passes = {"forward": n_etas + own_steps, "tangent": 1 + groups, "reverse": int(parameters or update is not None)}
    sample = n_etas * int(batch.response_lens[sampled_rollouts(batch)].sum())
    tokens = sum(passes.values()) * int(batch.n_tokens) + sample
    if update is None:
        return passes | {"noise_floor": sample, "tokens": tokens}
    shares = (2 + groups) * update.n_tokens
    more = {"noise_floor": sample, "update": shares, "proxies": update.n_tokens}
    return passes | more | {"tokens": tokens + shares + update.n_tokens}


def cost_text(content: dict) -> str | None:
    """The cost in words; None for a run of a version that did not count."""
    found = content.get("cost")
    if found is None:
        return None
    passes = found["forward"] + found["tangent"] + found["reverse"]
    sample = (found["noise_floor"] + found.get("proxies", 0) + TANGENT * found.get("update", 0)) / content["n_tokens"]
    forwards = found["forward"] + TANGENT * found["tangent"] + REVERSE * found["reverse"] + sample
    share = found["noise_floor"] / content["n_tokens"] / len(content["measured"])
    update, more = found.get("update", 0), ""
    if update:
        more = f", {update // content['update_attribution']['n_tokens']} with derivatives over the update's,"
    return (
        f"{passes} passes over the rollouts{more} and noise floors on {share:.0%} of the tokens at each η, "
        f"{found['tokens']:,} tokens in all, "
        f"about {forwards:.0f} plain forward passes"
    )
