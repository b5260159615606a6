import copy
import weakref

import pytest
import torch
from models import random_batch, random_direction, random_model

from dentropy import Direction, Policy, importance, measure, slope
from dentropy.model import binding
from dentropy.passes.noise_floor import noise_floor
from dentropy.passes.parameter_attribution import parameter_attribution


def train_a_little(model, optimizer, steps=2, seed=0):
    """Leaves gradients and, for optimizers that keep one, a state."""
    torch.manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        model(input_ids=torch.randint(3, 40, (2, 7)), labels=torch.randint(3, 40, (2, 7))).loss.backward()
        if step + 1 < steps:
            optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_step_is_foreseen_and_nothing_is_touched(name, steps):
    model = random_model("qwen2")
    optimizer = OPTIMIZERS[name](model.parameters())
    torch.optim.lr_scheduler.LinearLR(optimizer)  # patches optimizer.step on the instance
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    train_a_little(model, optimizer, steps)
    calls.clear()
    found = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    versions = [p._version for p in model.parameters()]

    lr = optimizer.param_groups[0]["lr"]
    direction = Direction.from_optimizer_step(model, optimizer)

    assert not calls and versions == [p._version for p in model.parameters()]
    assert_identical(found, (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    assert direction.step_size == lr
    optimizer.step()
    after = Direction.between(found[0], model.state_dict(), lr)
    for parameter, v in after.on(model):
        mine = next(u for p, u in direction.on(model) if p is parameter)
        assert torch.equal(mine, v)
    assert len(after.on(model)) == len(direction.on(model))


def assert_identical(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b


class Outsider(torch.optim.Optimizer):
    """An optimizer from elsewhere, with a setting pickling would lose and a counter it writes."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))
        self.sharpness, self.count = 2.0, 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.sharpness * p.grad.sign())


def test_an_optimizer_from_outside_pytorch_works():
    model = random_model("llama")
    optimizer = Outsider(model.parameters(), lr=0.5)
    train_a_little(model, optimizer, steps=1)
    direction = Direction.from_optimizer_step(model, optimizer)
    assert optimizer.count == 0
    torch.testing.assert_close(
        direction.tensors["lm_head.weight"], -2 * model.lm_head.weight.grad.sign(), rtol=1e-5, atol=1e-5
    )


def test_groups_with_different_rates_need_a_step_size():
    model = random_model("llama")
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.2}])
    train_a_little(model, optimizer, steps=1)
    with pytest.raises(ValueError, match="step_size"):
        Direction.from_optimizer_step(model, optimizer)
    direction = Direction.from_optimizer_step(model, optimizer, step_size=0.1)
    torch.testing.assert_close(
        direction.tensors["lm_head.weight"], -2 * model.lm_head.weight.grad, rtol=1e-4, atol=1e-5
    )


def test_optimizers_that_do_not_fit_are_refused():
    model = random_model("llama")
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="LBFGS.step needs a closure"):
        Direction.from_optimizer_step(model, lbfgs)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="gradient"):
        Direction.from_optimizer_step(model, sgd)
    train_a_little(model, sgd, steps=1)
    with pytest.raises(ValueError, match="belongs to the model"):
        Direction.from_optimizer_step(random_model("llama"), sgd)
    value_head = torch.nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="1 of its parameters"):
        Direction.from_optimizer_step(model, _with_grads(torch.optim.SGD([*model.parameters(), value_head], lr=0.1)))


def test_steps_that_gradients_alone_do_not_tell_are_refused():
    model = random_model("llama")
    clipped = _with_grads(torch.optim.SGD(model.parameters(), lr=0.1))
    clipped.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
    with pytest.raises(ValueError, match="step pre-hooks"):
        Direction.from_optimizer_step(model, clipped)
    with pytest.raises(ValueError, match="learning rate is 0.0"):
        Direction.from_optimizer_step(model, _with_grads(torch.optim.SGD(model.parameters(), lr=0.0)))


def test_a_step_that_bf16_rounds_away_is_told():
    model = random_model("llama").to(torch.bfloat16)
    with pytest.warns(UserWarning, match="vanish in bf16"):
        Direction.from_optimizer_step(model, _with_grads(torch.optim.AdamW(model.parameters(), lr=1e-4)))


def test_values_the_policy_cannot_hold_name_the_parameter():
    model = random_model("llama").half()
    for scale in (1e-12, 1e7):
        direction = Direction({"model.norm.weight": torch.full((32,), scale)})
        with pytest.raises(ValueError, match="model.norm.weight reaches from .* torch.float16 cannot hold"):
            direction.on(model)


def test_differences_keep_the_wider_side():
    before = {"w": torch.tensor([1.0, 2.0])}
    after = {"w": before["w"].double() + 1e-9}
    torch.testing.assert_close(
        Direction.between(before, after, 1e-9).tensors["w"], torch.ones(2).double(), rtol=1e-6, atol=0
    )


def test_aliases_of_one_tensor_are_saved(tmp_path):
    v = torch.ones(3, 2)
    Direction({"a": v, "b": v}).save(tmp_path / "v.safetensors")
    assert torch.equal(Direction.load(tmp_path / "v.safetensors").tensors["b"], v)


def _with_grads(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    return optimizer


def test_between_models_state_dicts_and_folders_agree(tmp_path):
    before, after = random_model("qwen2"), random_model("qwen2")
    with torch.no_grad():
        for name, v in random_direction(before).tensors.items():
            after.get_parameter(name).add_(1e-3 * v)
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    reference = Direction.between(before, after, 1e-3)
    torch.testing.assert_close(
        reference.tensors["model.norm.weight"],
        random_direction(before).tensors["model.norm.weight"],
        rtol=1e-2,
        atol=1e-3,
    )
    for other in (
        Direction.between(before.state_dict(), after.state_dict(), 1e-3),
        Direction.between(tmp_path / "before", tmp_path / "after", 1e-3),
        Direction.between(before, str(tmp_path / "after"), 1e-3),
    ):
        pairs = zip(reference.on(before), other.on(before), strict=True)
        assert all(p is q and torch.equal(u, v) for (p, u), (q, v) in pairs)


def test_an_alias_of_a_tied_tensor_may_be_missing_on_one_side():
    before, after = random_model("qwen2"), random_model("qwen2", seed=1)
    saved = {name: x for name, x in after.state_dict().items() if name != "lm_head.weight"}
    assert "lm_head.weight" in before.state_dict()
    moving = {id(p) for p, _ in Direction.between(before.state_dict(), saved, 1.0).on(before)}
    assert moving == {id(p) for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert id(before.lm_head.weight) in moving
    untied = saved | {"model.embed_tokens.weight": before.state_dict()["model.embed_tokens.weight"] + 1}
    del untied["model.norm.weight"]
    with pytest.raises(ValueError, match="after: 1 tensors are missing .model.norm.weight"):
        Direction.between(before.state_dict(), untied, 1.0)


def test_updates_lost_to_bf16_are_told():
    before = random_model("llama").to(torch.bfloat16)
    after = copy.deepcopy(before)
    with torch.no_grad():
        for p in after.parameters():
            p += 1e-4 * torch.randn_like(p)  # most weights are some 0.2: 1e-4 is below 1/256 of that
    with pytest.warns(UserWarning, match="vanish in bf16"):
        Direction.between(before, after, 1e-4)


def test_save_and_load_keep_every_bit(tmp_path):
    direction = random_direction(random_model("llama"))
    direction = Direction(direction.tensors, step_size=3e-7)
    direction.save(tmp_path / "v.safetensors")
    loaded = Direction.load(tmp_path / "v.safetensors")
    assert loaded.step_size == 3e-7
    assert_identical(dict(sorted(loaded.tensors.items())), dict(sorted(direction.tensors.items())))
    (tmp_path / "bad.safetensors").write_bytes(b"not at all")
    for path, named in (("bad.safetensors", "not a safetensors file"), ("nowhere.safetensors", "no such file")):
        with pytest.raises(ValueError, match=named):
            Direction.load(tmp_path / path)


@pytest.mark.parametrize(
    "tensors, step_size, named",
    [
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, 1.0, "all 2 tensors are zero"),
        ({"a": torch.tensor([1.0, float("nan")])}, 1.0, "a has values that are not finite"),
        ({"a": torch.ones(2, dtype=torch.int64)}, 1.0, "a is torch.int64"),
        ({}, 1.0, "no tensors"),
        ({"a": torch.ones(2)}, 0.0, "step_size: 0.0"),
        ({"a": torch.ones(2)}, float("inf"), "step_size: inf"),
    ],
)
def test_directions_that_mean_nothing_are_refused(tensors, step_size, named):
    with pytest.raises(ValueError, match=named):
        Direction(tensors, step_size)


def test_equal_checkpoints_and_different_shapes_are_refused(tmp_path):
    model = random_model("llama")
    with pytest.raises(ValueError, match="equal to before in every tensor"):
        Direction.between(model, model, 1.0)
    other = {name: x[:1] for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="has shape"):
        Direction.between(model.state_dict(), other, 1.0)
    with pytest.raises(ValueError, match="before: .*no such folder"):
        Direction.between(tmp_path / "nowhere", model, 1.0)


def test_slopes_scale_with_the_direction():
    model = random_model("llama")
    batch, policy, direction = random_batch(), Policy(model), random_direction(model)
    twice = Direction({n: 2 * v for n, v in direction.tensors.items()})
    assert twice.norm() == pytest.approx(2 * direction.norm())
    a, b = measure(policy, batch, direction), measure(policy, batch, twice)
    assert abs(b.dentropy - 2 * a.dentropy).max() <= 1e-5 * abs(a.dentropy).max()


class TestABinding:
    """What `Policy.moving` keeps of a direction between passes."""

    @pytest.fixture
    def casts(self, monkeypatch) -> list[int]:
        """How many tensors were cast each time that one was made."""
        made, cast = [], binding._cast

        def counted(moving, parameters):
            made.append(len(moving))
            return cast(moving, parameters)

        monkeypatch.setattr(binding, "_cast", counted)
        return made

    def test_is_made_once_for_all_passes(self, casts):
        model = random_model("qwen2")
        policy, batch = Policy(model), random_batch()
        direction = Direction({name: v.double() for name, v in random_direction(model).tensors.items()})
        sums = measure(policy, batch, direction, order=2, keep_tokens=True)
        measured = importance(sums, measure(policy, batch, direction, eta=0.1))
        measure(policy, batch, direction, order=2, second_order="nested")
        parameter_attribution(policy, batch, direction, sums)
        noise_floor(policy, batch, direction, sums, measured, slope(sums, estimator="exact"), 0.1)
        assert casts == [len(direction.tensors)]
        assert all(v.dtype == p.dtype for p, v in policy.moving(direction))

    def test_is_made_anew_for_another_direction_and_other_parameters(self, casts):
        model = random_model("llama")
        policy, (one, two) = Policy(model), (random_direction(model, seed) for seed in (1, 2))
        for direction in (one, one, two, two, one):
            assert all(
                torch.equal(v, direction.tensors[name]) and p is model.get_parameter(name)
                for name, (p, v) in zip(direction.tensors, policy.moving(direction), strict=True)
            )
        assert len(casts) == 3
        model.double()
        assert {v.dtype for _, v in policy.moving(one)} == {torch.float64} and len(casts) == 4
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        assert any(p is model.lm_head.weight for p, _ in policy.moving(one)) and len(casts) == 4
        model.lm_head.weight = model.model.embed_tokens.weight
        with pytest.raises(ValueError, match="one tied parameter of the policy"):
            policy.moving(one)
        model.lm_head.weight = torch.nn.Parameter(torch.ones(2, 2))
        with pytest.raises(ValueError, match="lm_head.weight has shape"):
            policy.moving(one)

    def test_moves_both_of_what_was_tied(self):
        model = random_model("qwen2")
        policy, v = Policy(model), torch.ones(40, 32)
        both = Direction({"model.embed_tokens.weight": v, "lm_head.weight": v.clone()})
        assert len(policy.moving(both)) == 1
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        assert len(policy.moving(both)) == 2

    def test_goes_with_its_direction(self):
        model = random_model("llama")
        policy = Policy(model)
        direction = Direction({name: v.double() for name, v in random_direction(model).tensors.items()})
        held = weakref.ref(policy.moving(direction)[0][1])
        assert held() is not None
        del direction
        assert held() is None
