import pytest
import torch

from dentropy import linear_token_stats, token_stats
from dentropy.model.head import Head


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_scale_and_softcap_are_folded_into_constants_of_raw_logits(scale, softcap):
    """softcap(scale · z) / temperature, with its derivative by finite differences."""
    torch.manual_seed(0)
    hidden, dhidden = torch.randn(2, 5, 3, dtype=torch.float64)
    weight, bias, targets = torch.randn(7, 3).double(), torch.randn(7).double(), torch.tensor([0, 6, 3, 3, 1])
    head = Head(weight, bias, scale, softcap)

    def written_out(eta):
        z = scale * ((hidden + eta * dhidden) @ weight.T + bias)
        return token_stats((z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.7, targets)

    found = linear_token_stats(hidden, weight, targets, dhidden, bias=bias, **head.transform(0.7))
    at, plus, minus = (written_out(eta) for eta in (0.0, 1e-5, -1e-5))
    for name in ("logp", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(at, name), rtol=1e-12, atol=1e-12)
        difference = (getattr(plus, name) - getattr(minus, name)) / 2e-5
        torch.testing.assert_close(getattr(found, "d" + name), difference, rtol=1e-7, atol=1e-9)


def test_the_constants_of_configs_are_read():
    weight = torch.ones(2, 2)
    config = type("Config", (), dict(logits_scaling=4.0, logit_scale=None, final_logit_softcapping=3.0))
    assert Head.of(weight, None, config)[2:4] == (0.25, 3.0)
    assert Head.of(weight, None, type("Config", (), dict(logit_scale=0.5, lm_head_multiplier=3.0)))[2:4] == (1.5, None)
    assert Head.of(weight, None, object())[2:4] == (1.0, None)
