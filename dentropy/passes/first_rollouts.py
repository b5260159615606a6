"""The self-check on the first rollouts that a policy meets."""

from contextlib import nullcontext

import numpy as np

from dentropy.model.fingerprint import weights_fingerprint
from dentropy.model.policy import Policy
from dentropy.passes import ranks
from dentropy.rollouts.batch import PackedBatch

# Enough to go from prompt to response, few enough to cost next to nothing.
ROLLOUTS, TOKENS, BEHIND_THE_PROMPT = 3, 64, 32


def check_on_first(policy: Policy, batch: PackedBatch) -> None:
    """`Policy.check_on` for a few rollouts of the batch, where a prompt ends and its response begins; of several
    ranks all must have the same weights, or their shards of them."""
    if ranks.count() > 1 and not all(ranks.exchange(policy.seen_rollouts)) and not policy.is_sharded:
        ranks.agree("policy", weights_fingerprint(policy.model))
    with ranks.lockstep() if policy.is_sharded else nullcontext():
        policy.check_on(lambda: _some(batch))


def _some(batch: PackedBatch) -> list[np.ndarray]:
    windows = []
    for i in np.unique(np.linspace(0, len(batch) - 1, ROLLOUTS).astype(int)).tolist():
        tokens, _ = batch.row(i)
        windows.append(np.array(tokens[: batch.prompt_lens[i] + BEHIND_THE_PROMPT][-TOKENS:]))
    return windows
