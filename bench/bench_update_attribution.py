"""What the update's own tokens cost: a probe that explains its update beside the same probe without.

    pytest bench/bench_update_attribution.py --benchmark-json=run.json && python bench/report.py run.json

The demo's policy, 64 prompts with 8 rollouts each to judge, as many or four times as many that make the update, float32
on a CPU, one η. Times are relative to what the attribution is to cost at most: the probe without it, one reverse pass
and two passes with tangents over the update's rollouts. Both probes are without parameters' shares
(`parameters=False`): these take the same reverse pass, so to a probe with them, as it is by default, the attribution
adds none. Up to NOISE_ROLLOUTS of an update its noise takes a whole pass, in four parts, and the grades of proxies come
on top: small updates cost more than that, large ones less. `test_parts` has each part, in passes with tangents over the
update's rollouts, of a quarter as many too.
"""

import numpy as np
import pytest
from interleaved import Provider, compare

import dentropy
from dentropy.demo.run import draw_rollouts, load_policy
from dentropy.experiment.proxies import grades
from dentropy.passes.policy_gradient import policy_gradient_step
from dentropy.passes.reverse_mode import gradient
from dentropy.passes.slope_gradient import slope_gradient
from dentropy.passes.update_attribution import PARTS

ETA = 1e-4
PROMPTS, PER_PROMPT = 64, 8
UPDATES = (PROMPTS, 4 * PROMPTS)
ADDS_UP = 1e-3  # in float32, of what the shares come to in size


def drawn(update_prompts):
    """The policy, the rollouts to judge and the step."""
    policy, tokenizer = load_policy()
    batch = draw_rollouts(policy, tokenizer, PROMPTS, PER_PROMPT, seed=0)
    rewarded = draw_rollouts(policy, tokenizer, update_prompts, PER_PROMPT, seed=1)
    return policy, batch, policy_gradient_step(policy, rewarded, step_size=ETA)


def error_of(found):
    return abs(found.unexplained) / abs(found.share).sum()


@pytest.mark.parametrize("update_prompts", UPDATES)
def test_update_attribution(benchmark, update_prompts):
    policy, batch, step = drawn(update_prompts)
    direction, parameters = step.direction(), list(policy.model.parameters())
    weights = np.ones(step.batch.n_tokens)

    def probed(update=None):
        return dentropy.probe(policy, batch, direction, [ETA], parameters=False, update=update)

    def allowed():
        probed()
        gradient(policy, step.batch, parameters, weights, weights)
        for _ in range(2):
            dentropy.measure(policy, step.batch, direction)

    compare(
        benchmark,
        f"A probe's update explained, demo's policy, {len(batch)} + {len(step.batch)} rollouts, float32, CPU",
        {
            "dentropy, explained": Provider(lambda: probed(step), ADDS_UP),
            "dentropy, not explained": Provider(probed),
            "at most": Provider(allowed),
        },
        (),
        lambda result: error_of(result.update),
        device="cpu",
        reference="at most",
    )


@pytest.mark.parametrize("update_prompts", [PROMPTS // 4, *UPDATES])
def test_parts(benchmark, update_prompts):
    policy, batch, step = drawn(update_prompts)
    direction, parameters = step.direction(), list(policy.model.parameters())
    weights = np.ones(step.batch.n_tokens)
    sums = dentropy.measure(policy, batch, direction, keep_tokens=True)

    def of_slope():
        return slope_gradient(policy, batch, sums, list(step.gradient), parts=PARTS)

    known = of_slope()

    def attributed():
        return dentropy.update_attribution(policy, batch, step, sums, direction=direction, gradient=known)

    found = attributed()
    compare(
        benchmark,
        f"The parts of an update explained, demo's policy, {len(batch)} + {len(step.batch)} rollouts, float32, CPU",
        {
            "dentropy, gradient of the slope": Provider(of_slope),
            "dentropy, shares and their noise": Provider(attributed, ADDS_UP),
            "dentropy, grades of proxies": Provider(lambda: grades(step, found)),
            "a reverse pass": Provider(lambda: gradient(policy, step.batch, parameters, weights, weights)),
            "a pass with tangents": Provider(lambda: dentropy.measure(policy, step.batch, direction)),
        },
        (),
        error_of,
        device="cpu",
        reference="a pass with tangents",
    )
