"""The trainer's own rollouts: an engine's probabilities of their tokens go with them."""

import torch

from dentropy.integrations import next_rollouts


def test_what_an_engine_gave_the_tokens_goes_with_them():
    part = {
        "prompt_ids": torch.tensor([[0, 5, 6], [0, 0, 7]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.tensor([[8, 9, 1], [4, 1, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    assert next_rollouts.packed([part], 0.7).sampler_logp is None
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-0.25, -3.0, 0.0]])
    batch = next_rollouts.packed([part | {"sampling_per_token_logps": logps}] * 2, 0.7)
    assert batch.sampler_logp.tolist() == [-1.0, -2.0, -0.5, -0.25, -3.0] * 2
    assert [list(batch.response(i)) for i in range(4)] == [[8, 9, 1], [4, 1]] * 2
    assert batch.group.tolist() == [0, 1, 0, 1] and batch.temperature == 0.7
