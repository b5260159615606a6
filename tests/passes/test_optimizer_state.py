"""Saved optimizers against the step that the very optimizer takes with the same gradient."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from models import random_batch, random_model, with_lora

from dentropy import Direction, Policy, policy_gradient_direction

STEP = 1e-3


def warmed_up(optimizer, steps=3):
    """With moments of `steps` random gradients, each element of its own size."""
    torch.manual_seed(0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p) * torch.rand_like(p)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def own_step(model, policy, batch, optimizer) -> dict[str, torch.Tensor]:
    """(after − before)/STEP of optimizer.step(), in float64, with the gradient of the documented loss."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ascent = policy_gradient_direction(policy, batch, step_size=STEP, optimizer="sgd").tensors
    before = {name: p.detach().double().clone() for name, p in named.items()}
    for name, p in named.items():
        p.grad = -ascent[name].to(p.dtype)
    optimizer.step()
    found = {name: (p.detach().double() - before[name]) / STEP for name, p in named.items()}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(before[name])
            p.grad = None
    return found


def assert_continued(model, optimizer, state=None):
    """The direction from the state, and the step the optimizer itself takes: equal to rounding of the weights."""
    policy, batch = Policy(model), random_batch(reward=True)
    state = copy.deepcopy(optimizer.state_dict() if state is None else state)
    direction = policy_gradient_direction(policy, batch, step_size=STEP, optimizer_state=state)
    truth = own_step(model, policy, batch, optimizer)
    assert {name for name, v in truth.items() if v.any()} == set(direction.tensors)
    for name, v in direction.tensors.items():
        error = float((v.double() - truth[name]).norm() / truth[name].norm())
        assert error < 2e-3, (name, error)


@pytest.fixture
def model():
    return random_model("llama")


def in_groups(model):
    """Embedding and head at a hundredth of the rate, layers in another order than the model's."""
    named = dict(model.named_parameters())
    slow = [name for name in named if "embed" in name or "head" in name]
    layers = [name for name in named if name not in slow][::-1]
    return [
        {"params": [(name, named[name]) for name in layers]},
        {"params": [(name, named[name]) for name in slow], "lr": STEP / 100},
    ]


@pytest.mark.parametrize(
    "settings",
    [dict(weight_decay=0.0), dict(weight_decay=0.1, amsgrad=True, betas=(0.8, 0.95), eps=1e-6), dict(maximize=True)],
    ids=["plain", "amsgrad, betas, eps, decay", "maximize"],
)
def test_each_group_keeps_its_names_its_settings_and_its_share_of_the_rate(model, settings):
    optimizer = warmed_up(torch.optim.AdamW(in_groups(model), lr=STEP, **settings))
    if "maximize" not in settings:
        return assert_continued(model, optimizer)
    # It climbs a reward: the moments are those of −reward, so the step is that of a minimizer with its state.
    twin = torch.optim.AdamW(in_groups(model), lr=STEP)
    state = optimizer.state_dict()
    twin.load_state_dict(copy.deepcopy(state))
    for group in twin.param_groups:
        group["maximize"] = False
    return assert_continued(model, twin, state)


def test_names_as_keys_and_a_dict_around_it(model):
    optimizer = warmed_up(torch.optim.AdamW(in_groups(model), lr=STEP))
    state = optimizer.state_dict()
    names = dict(enumerate(name for group in state["param_groups"] for name in group["param_names"]))
    keyed = {
        "state": {names[key]: entry for key, entry in state["state"].items()},
        "param_groups": [
            {key: value for key, value in group.items() if key != "param_names"} | {"params": group["param_names"]}
            for group in state["param_groups"]
        ],
    }
    assert_continued(model, optimizer, {"epoch": 3, "optimizer_state_dict": keyed, "config": {"lr": 1e-3}})


def test_lora_plus_of_a_wrapped_model_on_one_from_disk(model, tmp_path):
    from peft.optimizers import create_loraplus_optimizer

    from dentropy.model.checkpoint import load_checkpoint

    model.save_pretrained(tmp_path / "base")
    lora = with_lora(
        load_checkpoint(tmp_path / "base", "policy", torch.float32), r=32, target_modules=["q_proj", "o_proj"]
    )
    lora.save_pretrained(tmp_path / "adapter")
    optimizer = create_loraplus_optimizer(lora, torch.optim.AdamW, lr=STEP, loraplus_lr_ratio=16)
    warmed_up(optimizer)
    lora.save_pretrained(tmp_path / "adapter")
    state, batch = optimizer.state_dict(), random_batch(reward=True)
    loaded = Policy.from_pretrained(tmp_path / "adapter", device="cpu")
    with pytest.raises(ValueError, match="without names, expected param_names"):
        policy_gradient_direction(loaded, batch, step_size=STEP, optimizer_state=state)
    ids = {id(p): name for name, p in lora.named_parameters()}
    for kept, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        kept["param_names"] = [ids[id(p)] for p in group["params"]]
    direction = policy_gradient_direction(loaded, batch, step_size=STEP, optimizer_state=state)
    truth = Direction(own_step(lora, Policy(lora), batch, optimizer), STEP)
    own = {id(p): name for name, p in loaded.model.named_parameters()}
    truth = {own[id(p)]: v.double() for p, v in truth.on(loaded.model)}
    assert set(truth) == set(direction.tensors)
    for name, v in direction.tensors.items():
        assert float((v.double() - truth[name]).norm() / truth[name].norm()) < 2e-3, name
    with pytest.raises(ValueError, match="step_size: 0.005, and the groups .* 0.001, 0.016; expected one of these"):
        policy_gradient_direction(loaded, batch, step_size=5e-3, optimizer_state=state)


def test_a_fresh_adamw_on_an_adapter_folder_moves_the_adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    from dentropy.model.checkpoint import load_checkpoint

    lora = with_lora(load_checkpoint(tmp_path / "base", "policy", torch.float32))
    lora.save_pretrained(tmp_path / "adapter")
    loaded, batch = Policy.from_pretrained(tmp_path / "adapter", device="cpu"), random_batch(reward=True)
    direction = policy_gradient_direction(loaded, batch, step_size=STEP, optimizer="sgd")
    truth = policy_gradient_direction(Policy(lora), batch, step_size=STEP, optimizer="sgd").on(loaded.model)
    own = {name: v for (p, v) in truth for name, q in loaded.model.named_parameters() if q is p}
    assert set(own) == set(direction.tensors) and all("lora_" in name for name in own)
    for name, v in direction.tensors.items():
        torch.testing.assert_close(v, own[name], rtol=1e-4, atol=1e-7)


def test_what_a_state_leaves_out_is_said(model):
    named = dict(model.named_parameters())
    part = [(name, p) for name, p in named.items() if "layers.1" in name]
    optimizer = warmed_up(torch.optim.AdamW(part, lr=STEP))
    state, batch = optimizer.state_dict(), random_batch(reward=True)
    del state["state"][2]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        direction = policy_gradient_direction(Policy(model), batch, step_size=STEP, optimizer_state=state)
    assert set(direction.tensors) == {name for name, _ in part}
    said = " ".join(str(warning.message) for warning in said)
    assert f"of {len(part)} of the policy's {len(named)} parameters; the others do not move" in said
    assert f"1 of its {len(part)} parameters have no moments ({part[2][0]}) and start anew" in said


def test_an_order_that_only_shapes_confirm_is_said(model):
    optimizer = warmed_up(torch.optim.AdamW(model.parameters(), lr=STEP))
    with pytest.warns(UserWarning, match="has no names, so its parameters are taken to be in the policy's order"):
        assert_continued(model, optimizer)
    vectors, matrices = ([p for p in model.parameters() if (p.ndim < 2) == small] for small in (True, False))
    reversed_groups = torch.optim.AdamW([{"params": vectors}, {"params": matrices}])
    with pytest.raises(ValueError, match=f"groups of {len(vectors)}, {len(matrices)} parameters without names"):
        assert_continued(model, reversed_groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_the_step_that_master_weights_take(model, dtype):
    """In float16 an ε of 1e-8 is 0."""
    half, batch = copy.deepcopy(model).to(dtype), random_batch(reward=True)
    found, truth = (
        policy_gradient_direction(Policy(m), batch, step_size=STEP).tensors for m in (half, copy.deepcopy(half).float())
    )
    assert all(v.dtype == torch.float32 for v in found.values())
    clear = {name: v.abs() > 0.5 for name, v in truth.items()}
    agree = torch.cat([found[name][clear[name]].sign() == v[clear[name]].sign() for name, v in truth.items()])
    assert float(agree.double().mean()) > 0.93  # where rounding decides the sign of a gradient, it decides the step


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_gradients_in_float16_keep_their_scale(model, scale):
    policy, batch = Policy(model.half()), random_batch()
    advantage = np.linspace(-1, 1, len(batch))
    one, scaled = (
        policy_gradient_direction(
            policy, dataclasses.replace(batch, advantage=a), step_size=1.0, optimizer="sgd"
        ).tensors
        for a in (advantage, scale * advantage)
    )
    for name, v in one.items():
        torch.testing.assert_close(scaled[name], v * scale, rtol=1e-2, atol=float(v.abs().max()) * scale * 1e-3)


def lion(group, entry):
    del group["eps"], entry["exp_avg_sq"], entry["step"]


def in_the_group(group, entry):
    group["step"] = int(entry.pop("step"))


def eight_bit(group, entry):
    entry["state1"] = entry.pop("exp_avg").to(torch.uint8)


BROKEN = {
    "no second moment": (lambda g, e: e.pop("exp_avg_sq"), "another optimizer's, with no tensor exp_avg_sq"),
    "Lion": (lion, "eps: None, expected a number"),
    "apex": (in_the_group, "no step in its state .apex keeps it in the group"),
    "8 bits": (eight_bit, "another optimizer's, with state1 in its state"),
    "NAdam": (lambda g, e: e.update(mu_product=torch.ones(())), "another optimizer's, with mu_product"),
    "RAdam": (lambda g, e: g.pop("amsgrad"), "amsgrad: None, expected True or False"),
    "amsgrad without its moment": (lambda g, e: g.update(amsgrad=True), "no tensor max_exp_avg_sq"),
    "momentum": (lambda g, e: g.update(momentum=0.9), "has momentum, as an SGD's"),
    "no betas": (lambda g, e: g.pop("betas"), "betas: None"),
    "a beta of 1": (lambda g, e: g.update(betas=(0.9, 1.0)), "betas: 1.0"),
    "eps of 0": (lambda g, e: g.update(eps=0.0), "eps: 0.0"),
    "eps NaN": (lambda g, e: g.update(eps=float("nan")), "eps: nan"),
    "eps of 3": (lambda g, e: g.update(eps=3.0), "eps: 3.0"),
    "eps as text": (lambda g, e: g.update(eps="1e-8"), "eps: '1e-8'"),
    "no learning rate": (lambda g, e: g.pop("lr"), "lr: None"),
    "decay below 0": (lambda g, e: g.update(weight_decay=-0.1), "weight_decay: -0.1"),
    "decay that leaves nothing": (lambda g, e: g.update(weight_decay=1e6), "weight_decay: 1e.06 at a learning rate"),
    "coupled decay": (lambda g, e: g.update(weight_decay=0.1, decoupled_weight_decay=False), "coupled weight decay"),
    "a step of 0": (lambda g, e: e.update(step=torch.tensor(0.0)), "step: 0.0"),
    "half a step": (lambda g, e: e.update(step=1.5), "step: 1.5"),
    "a step that is NaN": (lambda g, e: e.update(step=torch.tensor(float("nan"))), "step: nan"),
    "complex moments": (lambda g, e: e.update(exp_avg=e["exp_avg"].to(torch.complex64)), "exp_avg is torch.complex64"),
    "moments that are NaN": (lambda g, e: e["exp_avg"].fill_(float("nan")), "exp_avg has values that no AdamW leaves"),
    "squares below 0": (lambda g, e: e["exp_avg_sq"].neg_(), "exp_avg_sq has values that no AdamW leaves"),
    "another shape": (lambda g, e: e.update(exp_avg=e["exp_avg"][:1]), "exp_avg has shape .1, 32., expected .40, 32."),
    "a name that is not the policy's": (lambda g, e: g["param_names"].__setitem__(0, "value_head"), "value_head"),
    "a name too few": (lambda g, e: g["param_names"].pop(), "param_names: .*expected a name for each"),
}


@pytest.fixture(scope="module")
def saved():
    model = random_model("llama")
    optimizer = warmed_up(torch.optim.AdamW(model.named_parameters(), lr=STEP), steps=1)
    return Policy(model), random_batch(reward=True), optimizer.state_dict()


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_an_adamws_is_named(saved, case):
    policy, batch, state = saved
    state, (broken, named) = copy.deepcopy(state), BROKEN[case]
    broken(state["param_groups"][0], state["state"][0])
    with pytest.raises(ValueError, match=f"^optimizer_state: .*{named}"):
        policy_gradient_direction(policy, batch, step_size=STEP, optimizer_state=state)


@pytest.mark.parametrize(
    "around, named",
    [
        (lambda s: {"actor": s, "critic": s}, "2 optimizers .actor, critic. in it"),
        (lambda s: {"param_groups": s["param_groups"]}, "no 'state' beside its param_groups"),
        (lambda s: s["state"], "no param_groups in it, only 0, 1, 2"),
        (lambda s: {"state": s["state"], "param_groups": []}, "param_groups is no list of groups"),
        (lambda s: [s], "a list, expected"),
        (lambda s: s | {"state": s["state"] | {99: s["state"][0]}}, "entries of no parameter of its groups .99."),
    ],
)
def test_what_is_no_optimizers_state_is_named(saved, around, named):
    policy, batch, state = saved
    with pytest.raises(ValueError, match=f"^optimizer_state: {named}"):
        policy_gradient_direction(policy, batch, step_size=STEP, optimizer_state=around(state))


def test_settings_of_how_a_step_is_computed_change_nothing(saved):
    policy, batch, state = saved
    found = policy_gradient_direction(policy, batch, step_size=STEP, optimizer_state=state)
    elsewhere = copy.deepcopy(state)
    elsewhere["param_groups"][0] |= {
        "capturable": True,
        "fused": True,
        "differentiable": True,
        "lr": torch.tensor(STEP),
    }
    for other in (elsewhere, {"optimizer": state}):
        again = policy_gradient_direction(policy, batch, step_size=STEP, optimizer_state=other)
        assert all(torch.equal(v, again.tensors[name]) for name, v in found.tensors.items())
