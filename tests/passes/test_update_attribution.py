"""Shares of single tokens against direct products of gradients, of a model small enough to have them all."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from crosses import crossed
from models import InFloat64, random_model
from tiny import EVALUATION, STEP, UPDATE, Tiny

from dentropy import (
    Direction,
    PackedBatch,
    Policy,
    PolicyLoss,
    measure,
    policy_gradient_step,
    slope,
    update_attribution,
)
from dentropy.passes.parameter_attribution import parameter_attribution
from dentropy.passes.slope_gradient import slope_gradient

RNG = np.random.default_rng(2)
SOME_LOGP = -RNG.exponential(size=(2, UPDATE.n_tokens))


@pytest.fixture(scope="module")
def tiny():
    with InFloat64():
        return Tiny()


def named(tiny):
    return list(tiny.named.items())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=STEP),
    "sgd, decay": lambda p: torch.optim.SGD(p, lr=STEP, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=STEP, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=STEP, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=STEP, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=STEP, betas=(0.8, 0.95), weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=STEP, amsgrad=True),
    "two rates": lambda p: torch.optim.AdamW([{"params": p[:3]}, {"params": p[3:], "lr": STEP / 10}], lr=STEP),
}
LOSSES = {
    "plain": PolicyLoss(),
    "clipped, KL, bonus": PolicyLoss(
        average="sequence",
        clip=(0.6, 0.9),
        old_logp=SOME_LOGP[0],
        reference_logp=SOME_LOGP[1],
        kl=0.1,
        entropy_bonus=0.2,
    ),
}


def stepped(tiny, optimizer, gradient, clip=None) -> dict[str, torch.Tensor]:
    """(after − before)/STEP of the optimizer's own step with that gradient; the weights are put back."""
    before = {name: p.detach().clone() for name, p in tiny.named.items()}
    for name, p in tiny.named.items():
        p.grad = gradient[name].clone()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(tiny.named.values(), clip)
    optimizer.step()
    moved = {name: (p.detach() - before[name]) / STEP for name, p in tiny.named.items()}
    with torch.no_grad():
        for name, p in tiny.named.items():
            p.copy_(before[name])
            p.grad = None
    return moved


def warmed_up(tiny, name, steps=3):
    torch.manual_seed(0)
    optimizer = OPTIMIZERS[name](named(tiny))
    for _ in range(steps):
        stepped(tiny, optimizer, {name: torch.randn_like(p) for name, p in tiny.named.items()})
    return optimizer


def diagonal(optimizer, name: str, group: dict) -> torch.Tensor | float:
    """ρ γ P after its step, from the state that torch left."""
    entry = next(optimizer.state[p] for p, n in zip(group["params"], group["param_names"], strict=True) if n == name)
    if "betas" not in group:
        kept = 1 - group["dampening"]
        return 1 + group["momentum"] * kept if group["nesterov"] else kept
    (b1, b2), t = group["betas"], float(entry["step"])
    second = entry["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    return group["lr"] / STEP * (1 - b1) / (1 - b1**t) / ((second / (1 - b2**t)).sqrt() + group["eps"])


@crossed(lambda name, loss: (loss == "plain") == list(OPTIMIZERS).index(name) % 2, name=OPTIMIZERS, loss=LOSSES)
def test_every_share_is_the_product_of_gradients_and_all_add_up(tiny, name, loss):
    clip = None if loss == "plain" else 0.02
    with InFloat64():
        optimizer = warmed_up(tiny, name)
        kind = {"adam": "adam", "adamw": "adamw", "amsgrad": "adamw", "two rates": "adamw"}.get(name, "sgd")
        settings = dict(loss=LOSSES[loss], optimizer=kind, max_grad_norm=clip)
        settings["optimizer_state"] = copy.deepcopy(optimizer.state_dict())
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, **settings)
        logp, entropy = tiny.values(UPDATE)
        of = step.coefficients
        weights = torch.tensor(of.logp), torch.tensor(np.zeros(len(of.logp)) if of.entropy is None else of.entropy)
        gradient = tiny.gradient((weights[0] * logp).sum() + (weights[1] * entropy).sum())
        moved = stepped(tiny, optimizer, gradient, clip)
        assert clip is None or step.clip_factor < 0.5
        direction = step.direction()
        for key, v in moved.items():  # (after − before)/STEP has lost digits to the weights
            torch.testing.assert_close(direction.tensors[key], v, rtol=1e-9, atol=1e-11)
        sums = measure(tiny.policy, EVALUATION, direction, keep_tokens=True)
        found = update_attribution(tiny.policy, EVALUATION, step, sums)
        steepest, (logp, _) = tiny.slope_gradient(EVALUATION), tiny.values(UPDATE)
        scale = abs(found.share).sum()
        for group in optimizer.param_groups:
            for key in group["param_names"]:
                steepest[key] = steepest[key] * diagonal(optimizer, key, group) * step.clip_factor
        direct = [
            -weight * sum(float((g[key] * u).sum()) for key, u in steepest.items())
            for weight, g in zip(of.policy.tolist(), (tiny.gradient(x) for x in logp))
        ]
        np.testing.assert_allclose(found.share, direct, rtol=1e-9, atol=1e-11 * scale)
        shares = parameter_attribution(tiny.policy, EVALUATION, direction, sums)
    named_terms = found.tokens + found.kl + found.entropy_bonus + found.momentum + found.weight_decay
    size = scale + abs(found.momentum) + abs(found.weight_decay) + abs(found.kl)
    assert abs(found.unexplained) < 1e-10 * size and found.cosine == pytest.approx(1, abs=1e-12)
    assert abs(named_terms - sum(shares.values())) < 1e-10 * size
    assert found.total == slope(sums).value
    assert (found.kl != 0) == (found.entropy_bonus != 0) == (loss != "plain")
    assert (found.momentum != 0) == (name not in ("sgd", "sgd, decay"))


def test_a_fresh_adamw_and_the_other_estimators(tiny):
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP)
        sums = measure(tiny.policy, EVALUATION, step.direction(), keep_tokens=True)
        for settings in (dict(estimator="exact"), dict(estimator="mixed", per="sequence")):
            found = update_attribution(tiny.policy, EVALUATION, step, sums, **settings)
            assert found.total == slope(sums, **settings).value and found.momentum == found.weight_decay == 0.0
            assert abs(found.unexplained) < 1e-9 * abs(found.share).sum()


def test_leaving_tokens_out_of_an_sgd_update_takes_their_shares_away(tiny):
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, optimizer="sgd")
        whole = measure(tiny.policy, EVALUATION, step.direction(), keep_tokens=True)
        found = update_attribution(tiny.policy, EVALUATION, step, whole)
        top = np.argsort(-abs(found.share))[:4]
        kept = found.advantage.copy()
        kept[top] = 0.0
        less = policy_gradient_step(
            tiny.policy, dataclasses.replace(UPDATE, advantage=kept), step_size=STEP, optimizer="sgd"
        )
        change = slope(whole).value - slope(measure(tiny.policy, EVALUATION, less.direction())).value
    assert change == pytest.approx(found.share[top].sum(), rel=1e-10)


@pytest.mark.parametrize("most, apart_by", [(1024, 1), (6, 2)])
def test_the_noise_is_the_shares_squared_standard_errors(tiny, most, apart_by, monkeypatch):
    """Of a prompt to each part n σ² is n times the sample variance, by hand; rollouts in turn, of many some, are asked
    of each part."""
    monkeypatch.setattr("dentropy.passes.update_attribution.NOISE_ROLLOUTS", most)
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, optimizer="sgd")
        sums = measure(tiny.policy, EVALUATION, step.direction(), keep_tokens=True)
        found = update_attribution(tiny.policy, EVALUATION, step, sums)
        apart = slope_gradient(tiny.policy, EVALUATION, sums, list(tiny.named), parts=9)
        whole = slope_gradient(tiny.policy, EVALUATION, sums, list(tiny.named))
        uneven = slope_gradient(tiny.policy, EVALUATION, sums, list(tiny.named), parts=3)
        logp, _ = tiny.values(UPDATE)
        gradients = [tiny.gradient(x) for x in logp]
    assert apart.portions == (0.25,) * 4 and whole.portions == (1.0,) and uneven.portions == (0.5, 0.25, 0.25)
    for name in tiny.named:
        for parts in (apart, uneven):
            torch.testing.assert_close(parts.whole(name), whole.parts[0][name])
    along = [[sum(float((g[n] * u).sum()) for n, u in part.items()) for g in gradients] for part in apart.parts]
    shares = -step.coefficients.policy * np.array(along)
    np.testing.assert_allclose(shares.sum(0), found.share, rtol=1e-9, atol=1e-14)
    squared = 4 / 3 * 4 * (shares - shares.mean(0)) ** 2  # each part's estimate of n σ²; their mean is 4 var
    np.testing.assert_allclose(squared.mean(0), 4 * shares.var(0, ddof=1))
    asked = np.flatnonzero(found.rollout % apart_by == 0)
    part = found.rollout[asked] // apart_by % 4
    noise = squared[part, asked].sum()
    assert found.noise_fraction == pytest.approx(noise / (found.share[asked] ** 2).sum(), rel=1e-9)
    assert f"{found.noise_fraction:.2f}" in repr(found)


def test_one_prompt_has_no_parts(tiny):
    one = EVALUATION.take([0, 1, 2])
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP)
        sums = measure(tiny.policy, one, step.direction(), keep_tokens=True)
        found = update_attribution(tiny.policy, one, step, sums)
    assert found.noise_fraction is None


def test_of_another_direction_the_rest_is_unexplained_and_no_tokens(tiny):
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, optimizer="sgd")
        own = update_attribution(
            tiny.policy, EVALUATION, step, measure(tiny.policy, EVALUATION, step.direction(), keep_tokens=True)
        )
        torch.manual_seed(3)
        size = step.direction().norm()
        noise = {name: torch.randn_like(v) for name, v in step.gradient.items()}
        length = Direction(noise).norm()
        real = Direction({name: v + noise[name] * size / length for name, v in step.direction().tensors.items()})
        sums = measure(tiny.policy, EVALUATION, real, keep_tokens=True)
        found = update_attribution(tiny.policy, EVALUATION, step, sums, direction=real)
    np.testing.assert_array_equal(found.share, own.share)
    assert found.unexplained == pytest.approx(found.total - own.total, rel=1e-8) and found.unexplained != 0
    flat = [torch.cat([d.tensors[n].flatten() for n in noise]) for d in (real, step.direction())]
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(*flat, dim=0)))


def test_of_a_slope_after_the_step_the_shares_are_products_of_gradients_at_both_weights(tiny):
    """⟨∇R after the step, ∇logp_j before it⟩, by autograd."""
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP, optimizer="sgd")
        after = Tiny()
        with torch.no_grad():
            for name, p in after.named.items():
                p.add_(step.direction().tensors[name], alpha=100 * STEP)
        sums = measure(after.policy, EVALUATION, step.direction(), keep_tokens=True)
        found = update_attribution(after.policy, EVALUATION, step, sums)
        toward = after.slope_gradient(EVALUATION)
        logp, weight = tiny.values(UPDATE)[0], torch.tensor(-step.coefficients.policy)

        def product(value):
            return sum(float((toward[name] * g).sum()) for name, g in tiny.gradient(value).items())

        chosen = [0, 7, len(logp) - 1]
        products = [product(weight[j] * logp[j]) for j in chosen]
        whole = product((weight * logp).sum())
    np.testing.assert_allclose(found.share[chosen], products, rtol=1e-8)
    assert found.total == pytest.approx(whole, rel=1e-8) == found.share.sum()
    assert found.total != pytest.approx(slope(measure(tiny.policy, EVALUATION, step.direction())).value, rel=1e-3)


def test_the_padding_row_of_an_embedding_is_nobodys(tiny):
    """A policy can generate its padding token, whose embedding a trainer gives no gradient."""
    padded = PackedBatch.from_lists([[3], [3]], [[0, 4, 0, 5], [4, 0, 2]], group=[0, 0], reward=[0.0, 1.0])
    with InFloat64():
        step = policy_gradient_step(tiny.policy, padded, step_size=STEP)
        judged = PackedBatch.from_lists([[3], [5]], [[0, 2, 0, 1], [1, 0, 4]])
        sums = measure(tiny.policy, judged, step.direction(), keep_tokens=True)
        found = update_attribution(tiny.policy, judged, step, sums)
    assert not step.gradient["model.embed_tokens.weight"][0].any()
    assert abs(found.unexplained) < 1e-9 * abs(found.share).sum()


def test_the_table_says_which_token_is_where(tiny):
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP)
        sums = measure(tiny.policy, EVALUATION, step.direction(), keep_tokens=True)
        found = update_attribution(tiny.policy, EVALUATION, step, sums)
        tokens = measure(tiny.policy, UPDATE, keep_tokens=True).tokens
    for i in range(len(UPDATE)):
        rows = np.flatnonzero(found.rollout == i)
        assert found.token[rows].tolist() == UPDATE.response(i)
        assert found.position[rows].tolist() == list(range(1, len(rows) + 1))
    for name in ("logp", "entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(tokens, name))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_float32_adds_up_to_rounding(name):
    policy = Policy(random_model(name))
    step = policy_gradient_step(policy, UPDATE, step_size=STEP)
    sums = measure(policy, EVALUATION, step.direction(), keep_tokens=True)
    found = update_attribution(policy, EVALUATION, step, sums)
    assert abs(found.unexplained) < 2e-5 * abs(found.share).sum()


def test_bad_requests_are_refused(tiny):
    state = torch.optim.AdamW(random_model("gpt2").named_parameters()).state_dict()
    muon = {"state": {}, "param_groups": [{"params": ["lm_head.weight"], "ns_steps": 5, "momentum": 0.95, "lr": 0.1}]}
    sgd = torch.optim.SGD(named(tiny), lr=STEP, momentum=0.9).state_dict()
    for settings, said in [
        (dict(optimizer="muon"), "optimizer: 'muon' .Muon's step orthogonalizes"),
        (dict(optimizer="sgd", optimizer_state=muon), "Muon's step orthogonalizes"),
        (dict(optimizer_state=muon), "Muon's step orthogonalizes"),
        (dict(optimizer_state=state), "optimizer_state: .* names are not the policy's"),
        (dict(optimizer_state=sgd), "has momentum, as an SGD's"),
        (dict(optimizer="sgd", optimizer_state=torch.optim.Adam(named(tiny)).state_dict()), "has betas, as an Adam's"),
        (dict(max_grad_norm=0), "max_grad_norm: 0"),
        (dict(batch=dataclasses.replace(UPDATE, reward=None)), "batch: no rewards"),
        (dict(batch=dataclasses.replace(UPDATE, reward=np.ones(len(UPDATE)))), "do not differ within any prompt group"),
    ]:
        with pytest.raises(ValueError, match=said):
            policy_gradient_step(tiny.policy, **(dict(batch=UPDATE, step_size=STEP) | settings))
    with InFloat64():
        step = policy_gradient_step(tiny.policy, UPDATE, step_size=STEP)
        sums = measure(tiny.policy, EVALUATION, step.direction())
        with pytest.raises(ValueError, match="keep_tokens=True"):
            update_attribution(tiny.policy, EVALUATION, step, sums)
        with pytest.raises(ValueError, match="update: a step of a policy with other parameters"):
            update_attribution(Policy(random_model("gpt2").double()), EVALUATION, step, sums)
