"""What the update's own tokens cost: a probe that explains its update beside the same probe without.

    pytest bench/bench_update_attribution.py --benchmark-json=run.json && python bench/report.py run.json

The demo's policy, 64 prompts with 8 rollouts each to judge, as many or four times as many that make the update, float32
on a CPU, one η. Times are relative to what the attribution is to cost at most: the probe without it (and without
parameters' shares, which take a reverse pass too), one reverse pass and two passes with tangents over the update's
rollouts. Up to NOISE_ROLLOUTS of an update its noise takes a whole pass, in four parts, and the grades of proxies come
on top: small updates cost more than that, large ones less.
"""

import numpy as np
import pytest
from interleaved import Provider, compare

import dentropy
from dentropy.demo.run import draw_rollouts, load_policy
from dentropy.passes.policy_gradient import policy_gradient_step
from dentropy.passes.reverse_mode import gradient

ETA = 1e-4
PROMPTS, PER_PROMPT = 64, 8
ADDS_UP = 1e-3  # in float32, of what the shares come to in size


@pytest.mark.parametrize("update_prompts", [PROMPTS, 4 * PROMPTS])
def test_update_attribution(benchmark, update_prompts):
    policy, tokenizer = load_policy()
    batch = draw_rollouts(policy, tokenizer, PROMPTS, PER_PROMPT, seed=0)
    rewarded = draw_rollouts(policy, tokenizer, update_prompts, PER_PROMPT, seed=1)
    step = policy_gradient_step(policy, rewarded, step_size=ETA)
    direction, parameters = step.direction(), list(policy.model.parameters())
    weights = np.ones(rewarded.n_tokens)

    def probed(update=None):
        return dentropy.probe(policy, batch, direction, [ETA], parameters=False, update=update)

    def allowed():
        probed()
        gradient(policy, rewarded, parameters, weights, weights)
        for _ in range(2):
            dentropy.measure(policy, rewarded, direction)

    def error_of(result):
        return abs(result.update.unexplained) / abs(result.update.share).sum()

    compare(
        benchmark,
        f"A probe's update explained, demo's policy, {len(batch)} + {len(rewarded)} rollouts, float32, CPU",
        {
            "dentropy, explained": Provider(lambda: probed(step), ADDS_UP),
            "dentropy, not explained": Provider(probed),
            "at most": Provider(allowed),
        },
        (),
        error_of,
        device="cpu",
        reference="at most",
    )
