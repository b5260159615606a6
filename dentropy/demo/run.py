"""The demo: the whole experiment on the policy that comes with the package.

1. Sample rollouts from the policy (the E-batch: entropy is predicted and measured on it).
2. Sample more, with rewards (the U-batch), and take the AdamW step of their policy gradient as the update.
3. Predict and measure the change of entropy at several η along it.
4. At the largest η, check the measurement against rollouts drawn from the moved policy itself.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from dentropy.demo import SEED, task
from dentropy.experiment.probe import ProbeResult, fresh_check, probe, tokens_to_run
from dentropy.experiment.progress import rollout_bar, token_bar
from dentropy.model import checkpoint
from dentropy.model.policy import Policy
from dentropy.passes.forward_mode import moved_weights
from dentropy.passes.measure import measure
from dentropy.passes.policy_gradient import policy_gradient_step
from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.sampling import sample

POLICY = Path(__file__).with_name("policy")
STEP_SIZE = 5e-5
STEPS = (1.0, 2.0, 4.0)
PROMPTS, PER_PROMPT = 384, 8
UPDATE_PROMPTS, UPDATE_PER_PROMPT = 512, 8
BATCH_SIZE = 512
PASS_AT_K = (1, 4)


def run(seed: int = SEED) -> ProbeResult:
    """Run the demo, with progress on stderr; the same seed gives the same result on the same machine."""
    # The operations are so small that a second thread gains nothing, and it costs minutes where it has to
    # wait for a core that is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(seed)
    finally:
        torch.set_num_threads(threads)


def _run(seed: int) -> ProbeResult:
    policy, tokenizer = load_policy()
    seeds = {"rollouts": seed, "update_rollouts": seed + 1, "fresh_rollouts": seed + 2}
    batch = draw_rollouts(policy, tokenizer, PROMPTS, PER_PROMPT, seed=seeds["rollouts"], label="1/4 rollouts")
    update = draw_rollouts(
        policy,
        tokenizer,
        UPDATE_PROMPTS,
        UPDATE_PER_PROMPT,
        seed=seeds["update_rollouts"],
        label="2/4 rewarded rollouts",
    )
    with token_bar("2/4 policy gradient", update.n_tokens) as progress:
        step = policy_gradient_step(policy, update, step_size=STEP_SIZE, progress=progress)
    direction = step.direction()
    etas = [step * STEP_SIZE for step in STEPS]
    with token_bar("3/4 predict and measure", tokens_to_run(policy, batch, etas, update=step)) as progress:
        result = probe(policy, batch, direction, etas, update=step, pass_at_k=PASS_AT_K, progress=progress)

    with moved_weights(policy, direction, etas[-1]):
        prompts = [batch.prompt(i) for i in range(0, len(batch), PER_PROMPT)]
        fresh = _sample(policy, prompts, PER_PROMPT, seeds["fresh_rollouts"], "4/4 fresh rollouts")
        with token_bar("4/4 score them", fresh.n_tokens) as progress:
            fresh_sums = measure(policy, fresh, progress=progress)
    source = {
        "policy": "the demo's, which answers '17=' with an expression of that value",
        "update": f"AdamW step of the policy gradient of {len(update)} rewarded rollouts, "
        f"mean reward {update.reward.mean():.2f}",
    }
    check = fresh_check(result, etas[-1], fresh_sums)
    return dataclasses.replace(result, seeds=seeds, source=source, fresh=check)


def load_policy() -> tuple[Policy, object]:
    """The demo's policy (float32, on the CPU: its numbers are the same everywhere) and its tokenizer."""
    return Policy.from_pretrained(POLICY, device="cpu"), load_tokenizer()


def load_tokenizer():
    return checkpoint.load_tokenizer(POLICY, "policy")


def draw_rollouts(
    policy: Policy, tokenizer, n_prompts: int, per_prompt: int, *, seed: int, label: str = "rollouts"
) -> PackedBatch:
    """Rollouts of `n_prompts` random prompts of the task, with their rewards."""
    texts = task.prompts(n_prompts, seed)
    batch = _sample(policy, [tokenizer.encode(text) for text in texts], per_prompt, seed, label)
    answers = [tokenizer.decode(batch.response(i), skip_special_tokens=True) for i in range(len(batch))]
    reward = [task.reward(texts[group], answer) for group, answer in zip(batch.group, answers, strict=True)]
    return dataclasses.replace(batch, reward=np.array(reward))


def _sample(policy: Policy, prompts: list[list[int]], per_prompt: int, seed: int, label: str) -> PackedBatch:
    with rollout_bar(label, len(prompts) * per_prompt) as progress:
        # One more than the longest answer, for its end token.
        return sample(
            policy,
            prompts,
            per_prompt=per_prompt,
            max_new_tokens=task.MAX_ANSWER + 1,
            seed=seed,
            batch_size=BATCH_SIZE,
            progress=progress,
        )
