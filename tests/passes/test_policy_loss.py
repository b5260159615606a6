"""The coefficients against the losses written out, differentiated by autograd with log-probabilities as leaves."""

import dataclasses

import numpy as np
import pytest
import torch
from models import random_batch

from dentropy import PackedBatch, PolicyLoss
from dentropy.passes.policy_loss import coefficients, group_normalized_advantages

BATCH = random_batch(reward=True, rollouts=12)
RNG = np.random.default_rng(0)
LOGP = -RNG.exponential(size=BATCH.n_tokens)
OLD, REFERENCE = LOGP + 0.3 * RNG.standard_normal((2, BATCH.n_tokens))
PER_TOKEN = RNG.standard_normal(BATCH.n_tokens)


def written_out(loss, batch, logp, entropy):
    """The scalar that a trainer minimizes, rollout by rollout."""
    n_prompts, total = len(set(batch.group.tolist())), 0.0
    offsets, old, reference = batch.response_offsets, torch.tensor(OLD), torch.tensor(REFERENCE)
    for i in range(len(batch)):
        k = slice(offsets[i], offsets[i + 1])
        n = int(batch.response_lens[i])
        if not n:
            continue
        log_ratio = logp[k] - (logp[k].detach() if loss.old_logp is None else old[k])
        if loss.ratio == "sequence":
            log_ratio = log_ratio.mean().expand(n)
        advantage = torch.as_tensor(group_normalized_advantages(batch)[i])
        r, (low, high) = log_ratio.exp(), loss.clip or (np.inf, np.inf)
        objective = torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)
        lag = reference[k] - logp[k]
        terms = -objective + loss.kl * (lag.exp() - lag - 1) - loss.entropy_bonus * entropy[k]
        in_prompt = int(batch.response_lens[batch.group == batch.group[i]].sum())
        size = {
            "token": batch.n_tokens,
            "sequence": len(batch) * n,
            "prompt": n_prompts * in_prompt,
            "length": len(batch) * (loss.max_length or 0),
        }[loss.average]
        total = total + terms.sum() / size
    return total


LOSSES = {
    "REINFORCE": PolicyLoss(),
    "GRPO": PolicyLoss(average="sequence", clip=(0.2, 0.2), old_logp=OLD, reference_logp=REFERENCE, kl=0.04),
    "DAPO": PolicyLoss(clip=(0.2, 0.28), old_logp=OLD),
    "per prompt": PolicyLoss(average="prompt", clip=(0.2, 0.2), old_logp=OLD, entropy_bonus=0.01),
    "Dr. GRPO": PolicyLoss(average="length", max_length=16, clip=(0.2, 0.2), old_logp=OLD),
    "GSPO": PolicyLoss(average="sequence", ratio="sequence", clip=(0.05, 0.02), old_logp=OLD),
    "all at once": PolicyLoss(average="prompt", old_logp=OLD, reference_logp=REFERENCE, kl=1.0, entropy_bonus=-0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_coefficients_are_the_derivatives_of_the_loss(name):
    loss = LOSSES[name]
    logp, entropy = (torch.tensor(x, requires_grad=True) for x in (LOGP, np.abs(OLD)))
    a, e = torch.autograd.grad(written_out(loss, BATCH, logp, entropy), [logp, entropy])
    found = coefficients(loss, BATCH, LOGP)
    np.testing.assert_allclose(found.logp, a, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.zeros_like(LOGP) if found.entropy is None else found.entropy, e, rtol=1e-12)
    if loss.clip is not None:
        assert 0 < (found.policy == 0).sum() < (found.advantage != 0).sum()


def test_advantages_per_token_are_used_as_they_are():
    batch = dataclasses.replace(BATCH, advantage=PER_TOKEN)
    found = coefficients(PolicyLoss(old_logp=OLD), batch, LOGP)
    np.testing.assert_allclose(found.policy, -PER_TOKEN * np.exp(LOGP - OLD) / BATCH.n_tokens, rtol=1e-12)
    assert found.advantage is PER_TOKEN


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(average="mean"), "average: 'mean', expected one of"),
        (dict(ratio="prompt"), "ratio: 'prompt'"),
        (dict(average="length"), "max_length: None"),
        (dict(max_length=5), "max_length: 5 with average='token'"),
        (dict(clip=(0.2, -0.1)), "clip: "),
        (dict(kl=0.1), "kl: 0.1 without reference_logp"),
        (dict(entropy_bonus=float("nan")), "entropy_bonus: nan"),
        (dict(old_logp=OLD[:-1]), "old_logp: shape"),
        (dict(old_logp=np.full_like(OLD, np.nan)), "old_logp: nan at token 0"),
        (dict(old_logp=LOGP + np.sign(PER_TOKEN), clip=(1e-9, 1e-9)), "no token has an advantage and a ratio within"),
    ],
)
def test_bad_losses_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        coefficients(PolicyLoss(**settings), dataclasses.replace(BATCH, advantage=-np.sign(PER_TOKEN)), LOGP)


def test_what_it_needs_of_the_rollouts():
    with pytest.raises(ValueError, match="logp: None"):
        coefficients(PolicyLoss(old_logp=OLD), BATCH)
    for reward, named in ((None, "no rewards"), ([1, 1], "do not differ")):
        with pytest.raises(ValueError, match=named):
            coefficients(PolicyLoss(), PackedBatch.from_lists([[1]] * 2, [[1]] * 2, group=[0, 0], reward=reward))
