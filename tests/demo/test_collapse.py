"""A sweep of η into collapse on the demo's policy: the verdict turns before the measurement goes wrong."""

import pytest

from dentropy import importance, importance_diagnostics, measure, moved_weights, policy_gradient_direction, sample
from dentropy.demo import task
from dentropy.demo.run import STEP_SIZE, draw_rollouts, load_policy
from dentropy.estimators import clustered_stderr
from dentropy.experiment.probe import entropy_per_token


@pytest.mark.slow
def test_the_verdict_turns_before_the_measurement_goes_wrong():
    """Wrong: further from fresh samples of the moved policy than its own 95% interval and theirs."""
    policy, tokenizer = load_policy()
    batch = draw_rollouts(policy, tokenizer, 64, 8, seed=0)
    update = draw_rollouts(policy, tokenizer, 128, 8, seed=1)
    direction = policy_gradient_direction(policy, update, step_size=STEP_SIZE)
    base = measure(policy, batch, direction)
    prompts = [batch.prompt(i) for i in range(0, len(batch), 8)]
    verdicts, wrong = [], []
    for steps in (0.5, 1, 4, 8, 64):
        eta = steps * STEP_SIZE
        measured = importance(base, measure(policy, batch, direction, eta=eta))
        with moved_weights(policy, direction, eta):
            fresh = measure(
                policy,
                sample(policy, prompts, per_prompt=32, max_new_tokens=task.MAX_ANSWER + 1, seed=7, batch_size=512),
            )
        value, influence = entropy_per_token(fresh)
        doubt = 2 * clustered_stderr(influence, fresh.group, "fixed")[0]
        low, high = measured.interval()
        verdicts.append(importance_diagnostics(measured).verdict)
        wrong.append(not low - doubt <= value - measured.base_value <= high + doubt)
    assert verdicts[0] == "reliable" and verdicts[-1] == "unusable"
    assert any(wrong), "the sweep did not reach collapse"
    assert verdicts.index("unusable") <= wrong.index(True)
    assert not any(w and v == "reliable" for w, v in zip(wrong, verdicts, strict=True))
