"""E_p S against logits in plain PyTorch, through heads with a scale, a softcap and a bias."""

import numpy as np
import pytest
import torch
from models import InFloat64, random_batch, random_model

from dentropy import Policy, mean_discriminant


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_it_is_the_sum_over_the_vocabulary(name):
    batch = random_batch(0, rollouts=5)
    with InFloat64():
        model = random_model(name).double()
        found = mean_discriminant(Policy(model), batch, token_budget=20)
        model.set_attn_implementation("eager")
        want = []
        for i in range(len(batch)):
            ids = torch.tensor([batch.prompt(i) + batch.response(i)])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(batch.prompt(i)) - 1 : -1]
            p = torch.softmax(logits / batch.temperatures[i], -1)
            h = -(p * p.log()).sum(-1, keepdim=True)
            want += (p**2 * (p.log() + h)).sum(-1).tolist()
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)
