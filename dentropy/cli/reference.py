"""The model that a KL penalty of the loss is to: read, asked for the update's tokens, and gone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dentropy.cli.options import loading
from dentropy.cli.terminal import about

if TYPE_CHECKING:
    import numpy as np


class Reference(NamedTuple):
    """Log-probabilities of the update's tokens, float64 [n_tokens], under a model, and that model's fingerprint."""

    logp: np.ndarray
    fingerprint: str


def of_update(options, policy, update) -> Reference | None:
    """The one that --loss-kl-reference names, None without, from a plain pass over rollouts `update`.

    It is in memory beside the policy, as the update's gradient later is, and no longer.

    Raises:
        ValueError: for what is no model, or one of another vocabulary than the policy's.
    """
    from dentropy.experiment.identity import policy_fingerprint
    from dentropy.experiment.progress import token_bar
    from dentropy.model.policy import Policy
    from dentropy.passes.measure import measure

    if options.loss_kl_reference is None:
        return None
    with about("--loss-kl-reference", "policy"):
        reference = Policy.from_pretrained(options.loss_kl_reference, **loading(options), shard=options.shard)
        if reference.vocab_size != policy.vocab_size:
            raise ValueError(
                f"{reference.vocab_size:,} tokens, expected the policy's vocabulary of {policy.vocab_size:,}"
            )
        with token_bar("reference", update.n_tokens) as progress:
            settings = {"token_budget": options.token_budget, "progress": progress}
            tokens = measure(reference, update, keep_tokens=True, **settings).tokens
        return Reference(tokens.logp.double().numpy(), policy_fingerprint(reference))
