"""The self-check on the first rollouts that a policy meets."""

from contextlib import nullcontext

import numpy as np

from dentropy.model.fingerprint import fingerprint, weights_fingerprint
from dentropy.model.policy import Policy
from dentropy.model.shards import is_shard
from dentropy.passes import ranks
from dentropy.passes.finished import digest_of
from dentropy.rollouts.batch import PackedBatch

# Enough to go from prompt to response, few enough to cost next to nothing.
ROLLOUTS, TOKENS, BEHIND_THE_PROMPT = 3, 64, 32


def check_on_first(policy: Policy, batch: PackedBatch) -> None:
    """`Policy.check_on` for a few rollouts of the batch, where a prompt ends and its response begins; of several
    ranks all must have the same weights, but for those that are in parts."""
    if ranks.count() > 1 and not all(ranks.exchange(policy.seen_rollouts)):
        ranks.agree("policy", weights_fingerprint(policy.model, _of_whole(policy)))
        if policy.is_sharded:  # ranks run together from here on
            ranks.agree("batch", digest_of(batch))
    with ranks.lockstep() if policy.is_sharded else nullcontext():
        policy.check_on(lambda: _some(batch))


def _of_whole(policy: Policy) -> dict[str, str]:
    """`parameter_fingerprints` of the parameters that every rank has whole."""
    whole = ((name, p) for name, p in policy.model.named_parameters() if not is_shard(p))
    return {name: fingerprint([(name, p)]) for name, p in whole}


def _some(batch: PackedBatch) -> list[np.ndarray]:
    windows = []
    for i in np.unique(np.linspace(0, len(batch) - 1, ROLLOUTS).astype(int)).tolist():
        tokens, _ = batch.row(i)
        windows.append(np.array(tokens[: batch.prompt_lens[i] + BEHIND_THE_PROMPT][-TOKENS:]))
    return windows
