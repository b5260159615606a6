import dataclasses

import numpy as np
import pytest
import torch
from models import SCALED, random_batch, random_direction, random_model

from dentropy import PackedBatch, Policy, measure, policy_gradient_direction
from dentropy.passes.policy_loss import group_normalized_advantages


def by_hand_gradient(model, batch) -> dict[str, torch.Tensor]:
    """The loss written out one rollout at a time, through the model's own logits."""
    model.set_attn_implementation("eager")
    loss = 0.0
    for i in range(len(batch)):
        peers = batch.reward[batch.group == batch.group[i]]
        advantage = (batch.reward[i] - peers.mean()) / (peers.std(ddof=1) + 1e-4)
        if batch.advantage is not None:
            advantage = batch.advantage[i]
        ids, n = torch.tensor([batch.prompt(i) + batch.response(i)]), len(batch.response(i))
        logits = model(input_ids=ids, use_cache=False).logits[0, len(batch.prompt(i)) - 1 : -1] / batch.temperature
        logp = torch.distributions.Categorical(logits=logits).log_prob(ids[0, -n:]) if n else logits.sum(-1)
        loss = loss - advantage * logp.sum() / batch.n_tokens
    names = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", *SCALED])
def test_sgd_direction_is_minus_the_gradient(name):
    model = random_model(name)
    batch = random_batch(reward=True, temperature=0.8)
    direction = policy_gradient_direction(Policy(model), batch, step_size=1e-3, optimizer="sgd", token_budget=30)
    assert direction.step_size == 1e-3
    for parameter, g in by_hand_gradient(model, batch).items():
        torch.testing.assert_close(direction.tensors[parameter], -g, rtol=1e-3, atol=1e-6)


def test_fresh_adamw_moves_by_the_sign_and_touches_nothing():
    model = random_model("llama")
    marker = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = marker
    before = {n: p.clone() for n, p in model.named_parameters()}
    batch = random_batch(reward=True)
    direction = policy_gradient_direction(Policy(model), batch, step_size=1e-6)
    gradient = by_hand_gradient(model, batch)["lm_head.weight"]
    clear = gradient.abs() > 1e-5
    torch.testing.assert_close(direction.tensors["lm_head.weight"][clear], -gradient[clear].sign(), rtol=2e-3, atol=0)
    assert model.lm_head.weight.grad is marker and bool((marker == 1).all())
    assert all(p.grad is None for n, p in model.named_parameters() if n != "lm_head.weight")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("split", [False, True], ids=["one group", "decay and no decay"])
def test_a_saved_adamw_state_is_continued(split):
    model = random_model("llama")
    parameters = list(model.parameters())
    groups = [{"params": parameters, "weight_decay": 0.1}]
    if split:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95))
    for seed in (1, 2):
        torch.manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.zero_grad()
    batch = random_batch(reward=True)
    direction = policy_gradient_direction(Policy(model), batch, step_size=1e-3, optimizer_state=optimizer.state_dict())
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    for name, g in by_hand_gradient(model, batch).items():
        model.get_parameter(name).grad = g
    optimizer.step()
    for name, v in direction.tensors.items():
        taken = (model.get_parameter(name).double() - before[name]) / 1e-3
        torch.testing.assert_close(v.double(), taken, rtol=1e-3, atol=2e-3)


def test_the_update_raises_the_probability_of_rewarded_rollouts():
    model = random_model("llama")
    batch = random_batch(reward=True, rollouts=12)
    policy = Policy(model)
    direction = policy_gradient_direction(policy, batch, step_size=1e-3, optimizer="sgd")
    sums = measure(policy, batch, direction)
    assert (group_normalized_advantages(batch) * sums.dlogp).sum() > 0


def test_advantages_are_normalized_within_groups():
    batch = PackedBatch.from_lists([[1]] * 5, [[1]] * 5, group=[3, 9, 3, 9, 4], reward=[0, 5, 1, 5, 7])
    half = 0.5 / (np.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(group_normalized_advantages(batch), [-half, 0, half, 0, 0], rtol=1e-12)


def test_given_advantages_are_used_as_they_are_and_not_rewards():
    """In groups of one, of one sign, of any spread: nothing is normalized again."""
    batch = random_batch(reward=True, temperature=0.8)
    given = np.linspace(0.5, 3.0, len(batch)) ** 2
    batch = dataclasses.replace(batch, advantage=given)
    assert group_normalized_advantages(batch).tolist() == given.tolist()
    model = random_model("llama")
    direction = policy_gradient_direction(Policy(model), batch, step_size=1e-3, optimizer="sgd")
    for parameter, g in by_hand_gradient(model, batch).items():
        torch.testing.assert_close(direction.tensors[parameter], -g, rtol=1e-3, atol=1e-6)


def test_bad_requests_are_refused():
    model = random_model("llama")
    policy, good = Policy(model), random_batch(reward=True)
    flat = PackedBatch.from_lists([[1]] * 2, [[1]] * 2, group=[0, 0], reward=[1, 1])
    other = torch.optim.AdamW(random_model("gpt2").parameters()).state_dict()
    reordered = torch.optim.AdamW(list(model.parameters())[::-1])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    reordered.step()
    coupled = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    for arguments, named in [
        (dict(batch=random_batch()), "no rewards"),
        (dict(batch=flat), "do not differ"),
        (dict(batch=dataclasses.replace(flat, advantage=np.zeros(2))), "every advantage is 0"),
        (dict(optimizer="lion"), "optimizer: 'lion'"),
        (dict(optimizer="sgd", optimizer_state=other), "optimizer_state"),
        (dict(optimizer_state=other), "optimizer_state: for"),
        (dict(optimizer_state=reordered.state_dict()), "optimizer_state: .*exp_avg has shape"),
        (dict(step_size=-1), "step_size"),
        (dict(optimizer_state=coupled.state_dict()), "coupled weight decay"),
    ]:
        with pytest.raises(ValueError, match=named):
            policy_gradient_direction(policy, **(dict(batch=good, step_size=1e-3) | arguments))
    assert random_direction(model).norm() > 0


@pytest.mark.parametrize("value", [0.5, 0.1, 0.7, -0.1, 1e9])
@pytest.mark.parametrize("n", [3, 8, 10])
def test_equal_rewards_are_equal_whatever_their_mean_rounds_to(value, n):
    def batch(reward):
        return PackedBatch.from_lists([[3]] * len(reward), [[4, 1]] * len(reward), [0] * n + [1, 1], reward)

    with pytest.raises(ValueError, match="do not differ"):
        group_normalized_advantages(batch([value] * n + [0.3, 0.1 + 0.2]))
    found = group_normalized_advantages(batch([value] * n + [0.0, 1.0]))
    assert not found[:n].any() and found[n] == -found[n + 1] < 0


def test_advantages_are_used_as_they_are():
    model, batch = random_model("llama"), random_batch(reward=True)
    normalized = policy_gradient_direction(Policy(model), batch, step_size=1.0, optimizer="sgd").tensors
    given = dataclasses.replace(batch, advantage=2 * group_normalized_advantages(batch))
    doubled = policy_gradient_direction(Policy(model), given, step_size=1.0, optimizer="sgd").tensors
    for name, v in normalized.items():
        torch.testing.assert_close(doubled[name], 2 * v, rtol=1e-5, atol=1e-8)
    alone = PackedBatch.from_lists([[3]], [[4, 1]], advantage=[1.2])
    assert group_normalized_advantages(alone).tolist() == [1.2]
    with pytest.raises(ValueError, match="every advantage is 0"):
        group_normalized_advantages(dataclasses.replace(alone, advantage=np.zeros(1)))


def test_rollouts_longer_than_the_positions_are_refused():
    over = PackedBatch.from_lists([[3] * 100] * 2, [[5, 1], [6, 1]], [0, 0], [0.0, 1.0])
    with pytest.raises(ValueError, match="rollout 0: 102 tokens, expected at most 64 positions"):
        policy_gradient_direction(Policy(random_model("llama")), over, step_size=1e-3)
