import numpy as np
import pytest
import torch
from models import SCALED, InFloat64, random_batch, random_direction, random_model

from dentropy import Policy, measure
from dentropy.passes import reverse_mode
from dentropy.passes.reverse_mode import gradient, weighted_token_sum


def inputs(rows=5, size=3, vocabulary=7):
    torch.manual_seed(0)
    tensor = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return (
        tensor(rows, size),
        tensor(vocabulary, size),
        torch.tensor([0, 6, 3, 3, 1]),
        tensor(rows),
        tensor(rows),
        tensor(vocabulary),
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, 2 * 7, 2**24])
def test_gradient_of_the_head_is_exact_in_any_chunks(softcap, chunk, monkeypatch):
    monkeypatch.setattr(reverse_mode, "CHUNK", chunk)
    hidden, weight, targets, a, b, bias = inputs()

    def value(hidden, weight, bias):
        return weighted_token_sum(hidden, weight, targets, a, b, bias=bias, temperature=0.7, softcap=softcap)

    z = hidden @ weight.T + bias
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.7
    policy = torch.distributions.Categorical(logits=z)
    expected = (a * policy.entropy() + b * policy.log_prob(targets)).sum()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    torch.testing.assert_close(value(*leaves), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(value, leaves)


def test_masked_vocabulary_contributes_nothing():
    hidden, weight, targets, a, b, bias = inputs()
    bias[5] = -torch.inf
    hidden.requires_grad_()
    keep = [0, 1, 2, 3, 4, 6]
    renumbered = torch.tensor([keep.index(t) for t in targets.tolist()])
    full = weighted_token_sum(hidden, weight, targets, a, b, bias=bias)
    without = weighted_token_sum(hidden, weight[keep], renumbered, a, b, bias=bias[keep])
    torch.testing.assert_close(full, without)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (full, without)))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "mixtral", *SCALED])
def test_reverse_mode_and_forward_mode_agree_through_the_model(name):
    model = random_model(name).double()
    batch, direction = random_batch(temperature=0.8), random_direction(model)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, batch.n_tokens))
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with InFloat64():
        policy = Policy(model)
        assert policy.splits_head
        pairs = direction.on(model)
        gradients = gradient(policy, batch, [p for p, _ in pairs], a, b, token_budget=30)
        stats = measure(policy, batch, direction, keep_tokens=True).tokens
    reverse = sum(float((g * v).sum()) for g, (_, v) in zip(gradients, pairs, strict=True))
    assert reverse == pytest.approx(float(a @ stats.dentropy.numpy() + b @ stats.dlogp.numpy()), rel=1e-10)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
