"""A policy small enough for the gradient of every single token, and rollouts to judge an update on and to make it."""

import numpy as np
import torch
from models import random_model

from dentropy import PackedBatch, Policy

TINY = dict(vocab_size=6, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
STEP = 1e-3


def drawn(seed: int, per_prompt: int = 3, prompts=((3,), (4, 5), (2, 3), (5,))) -> PackedBatch:
    rng = np.random.default_rng(seed)
    answers = [rng.integers(1, 6, rng.integers(1, 5)).tolist() for _ in range(per_prompt * len(prompts))]
    asked = [list(prompt) for prompt in prompts for _ in range(per_prompt)]
    group = np.repeat(np.arange(len(prompts)), per_prompt)
    return PackedBatch.from_lists(asked, answers, group=group, reward=rng.random(len(group)), temperature=0.8)


EVALUATION, UPDATE = drawn(0), drawn(1)


class Tiny:
    """The policy, and its tokens' log-probabilities and entropies as differentiable functions of its weights."""

    def __init__(self):
        self.model = random_model("llama", num_key_value_heads=1, eos_token_id=1, **TINY).double()
        self.named = dict(self.model.named_parameters())
        self.policy = Policy(self.model)

    def values(self, batch):
        self.model.set_attn_implementation("eager")
        logps, entropies = [], []
        for i in range(len(batch)):
            ids, answer = torch.tensor([batch.prompt(i) + batch.response(i)]), torch.tensor(batch.response(i))
            logits = self.model(input_ids=ids, use_cache=False).logits[0, len(batch.prompt(i)) - 1 : -1]
            logp = torch.log_softmax(logits / batch.temperature, -1)
            logps.append(logp.gather(1, answer[:, None])[:, 0])
            entropies.append(-(logp.exp() * logp).sum(-1))
        return torch.cat(logps), torch.cat(entropies)

    def gradient(self, value) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(value, list(self.named.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(self.named, found, strict=True))

    def slope_gradient(self, batch):
        """That of the causal measurement, in which the tokens before each weigh it."""
        logp, entropy = self.values(batch)
        weights = []
        for of_rollout in logp.split(batch.response_lens.tolist()):
            before = torch.cat([torch.zeros(1), of_rollout[:-1]]).cumsum(0)
            weights.append((before - before.detach()).exp())
        weight = torch.cat(weights)
        return self.gradient((weight * entropy).sum() / weight.sum())
