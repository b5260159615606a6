import dataclasses
import itertools

import numpy as np
import pytest
import torch
from models import (
    CONFIGS,
    LLAMA_LIKE,
    SCALED,
    InFloat64,
    quiet_fallback,
    random_batch,
    random_direction,
    random_model,
    reference_columns,
)

from dentropy import Direction, PackedBatch, Policy, curvature, importance, measure, moved_weights, slope

FIVE = ["llama", "qwen2", "gemma2", "gpt2", "mixtral"]


pytestmark = quiet_fallback


@pytest.mark.parametrize("name", [*CONFIGS, SCALED[-1]])
def test_every_column_equals_a_run_without_packing(name):
    model = random_model(name).double()
    batch, direction = random_batch(temperature=0.8), random_direction(model)
    with InFloat64():
        sums = measure(Policy(model), batch, direction, token_budget=40)
        expected = reference_columns(model, batch, direction)
    assert sums.n_tokens.tolist() == batch.response_lens.tolist()
    assert sums.group.tolist() == batch.group.tolist() and sums.rollout.tolist() == list(range(len(batch)))
    for column, values in expected.items():
        scale = np.sqrt(np.mean(np.square(values)))
        assert np.abs(getattr(sums, column) - values).max() <= 1e-10 * scale, column


@pytest.mark.parametrize("name", FIVE)
def test_exact_slope_is_the_central_difference_of_the_measurement(name):
    model = random_model(name).double()
    batch, direction, step = random_batch(rollouts=12), random_direction(model), 1e-5
    with InFloat64():
        policy = Policy(model)
        base = measure(policy, batch, direction)
        plus, minus = (measure(policy, batch, direction, eta=eta) for eta in (step, -step))
    difference = (importance(base, plus).delta - importance(base, minus).delta) / (2 * step)
    assert slope(base, estimator="exact").value == pytest.approx(difference, rel=1e-6)
    assert plus.dlogp is None


def test_causal_slope_and_curvature_are_the_differences_of_the_measurement_with_prefix_weights():
    model = random_model("llama").double()
    batch, direction, step = random_batch(rollouts=12), random_direction(model), 1e-4
    with InFloat64():
        policy = Policy(model)
        base = measure(policy, batch, direction, order=2, second_order="nested", keep_tokens=True)
        moved = {k: measure(policy, batch, direction, eta=k * step, keep_tokens=True) for k in (-2, -1, 1, 2)}
    delta = {k: importance(base, sums, weights="prefix").delta for k, sums in moved.items()}
    first = (8 * (delta[1] - delta[-1]) - (delta[2] - delta[-2])) / (12 * step)
    second = (16 * (delta[1] + delta[-1]) - (delta[2] + delta[-2])) / (12 * step**2)
    assert slope(base).value == pytest.approx(first, rel=1e-9)
    assert curvature(base, estimator="causal").value == pytest.approx(second, rel=1e-5)


def test_divergence_of_all_that_can_be_drawn_is_half_of_fisher_times_the_square_of_the_step():
    model = random_model("llama", vocab_size=6).double()
    prompt, end, others = [3, 4], 2, (0, 1, 3, 4, 5)
    prefixes = [prefix for n in range(3) for prefix in itertools.product(others, repeat=n)]
    drawn = [[*prefix, end] for prefix in prefixes] + [*map(list, itertools.product(others, repeat=3))]
    batch, direction = PackedBatch.from_lists([prompt] * len(drawn), drawn), random_direction(model)
    with InFloat64():
        policy = Policy(model)
        base = measure(policy, batch, direction)
        moved = {eta: measure(policy, batch, direction, eta=eta) for eta in (1e-5, -1e-5, 1e-6, -1e-6)}
    chance = np.exp(base.logp)
    assert chance.sum() == pytest.approx(1, rel=1e-12)
    kl = {eta: chance @ (base.logp - found.logp) for eta, found in moved.items()}
    half = chance @ base.fisher / 2
    assert chance @ np.square(base.dlogp) / 2 == pytest.approx(half, rel=1e-10)
    errors = [abs((kl[eta] + kl[-eta]) / (2 * eta**2) / half - 1) for eta in (1e-5, 1e-6)]  # of order η²
    assert errors[1] < 1e-5 and errors[1] < 0.02 * errors[0]


@pytest.mark.parametrize(
    "moves",
    [
        lambda name: "embed_tokens" in name,
        lambda name: "lm_head" in name,
        lambda name: "layers.1.mlp" in name,
        lambda name: "layers.0.self_attn.v_proj" in name,
        lambda name: "model.norm" in name,
    ],
    ids=["embedding", "head", "one mlp", "values", "final norm"],
)
def test_parameters_left_out_do_not_move(moves):
    model = random_model("llama")
    batch, part, policy = random_batch(), random_direction(model, names=moves), Policy(model)
    padded = Direction({n: part.tensors.get(n, torch.zeros_like(p)) for n, p in model.named_parameters()})
    some, zeros_elsewhere = measure(policy, batch, part), measure(policy, batch, padded)
    for column in ("dlogp", "dentropy", "entropy_to_go"):  # sums round in another order where zeros take part
        got, want = getattr(some, column), getattr(zeros_elsewhere, column)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.sqrt(np.mean(want**2)))
    assert np.abs(some.dlogp).max() > 0


class ExactLayerNorm(torch.overrides.TorchFunctionMode):
    """Nested jvp through F.layer_norm is wrong; through its arithmetic it is right."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.layer_norm:
            return func(*args, **(kwargs or {}))
        return self.arithmetic(*args, **(kwargs or {}))

    @staticmethod
    def arithmetic(x, normalized_shape, weight, bias, eps):
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


@pytest.mark.parametrize("second_order, tolerance", [("difference", 1e-5), ("nested", 1e-10)])
@pytest.mark.parametrize("name", [FIVE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FIVE[1:])])
def test_second_order_is_the_derivative_of_the_derivative(name, second_order, tolerance):
    """Against torch.func's jvp of jvp, one rollout at a time, through the model's own eager attention."""
    from torch.func import functional_call, jvp

    model = random_model(name).double()
    batch, direction = random_batch(temperature=0.8), random_direction(model)
    with InFloat64(), ExactLayerNorm():
        sums = measure(Policy(model), batch, direction, order=2, second_order=second_order, token_budget=40)
        model.set_attn_implementation("eager")
        if name == "mixtral":
            model.set_experts_implementation("eager")
        weights = {n: p.detach() for n, p in model.named_parameters()}
        for i in range(2, len(batch)):
            ids = torch.tensor([batch.prompt(i) + batch.response(i)])
            n = len(batch.response(i))

            def totals(eta):
                moved = {k: w + eta * direction.tensors[k] for k, w in weights.items()}
                logits = functional_call(model, moved, (), dict(input_ids=ids, use_cache=False)).logits[0, -n - 1 : -1]
                logp = torch.log_softmax(logits / batch.temperature, -1)
                return logp.gather(1, ids[0, -n:, None]).sum(), -(logp.exp() * logp).sum()

            def slopes(eta):
                return jvp(totals, (eta,), (torch.ones(()).double(),))[1]

            d2logp, d2entropy = jvp(slopes, (torch.zeros(()).double(),), (torch.ones(()).double(),))[1]
            # What rounding does to differences does not shrink with a second derivative that happens to be small.
            rounding = tolerance * np.sqrt(np.mean(sums.d2logp**2)) if second_order == "difference" else 0.0
            assert sums.d2logp[i] == pytest.approx(float(d2logp), rel=tolerance, abs=rounding)
            assert sums.d2entropy[i] == pytest.approx(
                float(d2entropy), rel=tolerance, abs=max(rounding, tolerance * abs(float(d2logp)))
            )
    assert (sums.second_order_step is None) == (second_order == "nested")


LIKE_OTHERS = ("qwen3", "phi3", "gemma3", "olmo2", "granite", "starcoder2")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LIKE_OTHERS)) for n in CONFIGS if n not in FIVE]
)
def test_nested_and_difference_agree_on_every_architecture(name):
    model = random_model(name).double()
    batch, direction = random_batch(), random_direction(model)
    with InFloat64():
        policy = Policy(model)
        difference = measure(policy, batch, direction, order=2)
        nested = measure(policy, batch, direction, order=2, second_order="nested")
    for column, exact in nested.columns().items():
        tolerance = 1e-5 if column.startswith("d2") or column.endswith("_2") else 1e-10
        error = np.abs(getattr(difference, column) - exact).max()
        assert error <= tolerance * max(np.sqrt(np.mean(np.square(exact, dtype=float))), 1e-30), column


def test_second_order_in_float32_is_near_float64():
    model = random_model("llama")
    batch, direction = random_batch(), random_direction(model)
    single = measure(Policy(model), batch, direction, order=2)
    double_direction = Direction({n: v.double() for n, v in direction.tensors.items()})
    with InFloat64():
        double = measure(Policy(model.double()), batch, double_direction, order=2, second_order="nested")
    for column in ("d2logp", "d2entropy", "entropy_to_go_2", "length_to_go_2"):
        expected = getattr(double, column)
        assert np.abs(getattr(single, column) - expected).max() <= 5e-2 * np.sqrt(np.mean(expected**2)), column
    np.testing.assert_allclose(single.second_order_step, single.second_order_step[0])
    with pytest.raises(ValueError, match="order: 2 with weights in torch.bfloat16"):
        measure(Policy(model.to(torch.bfloat16)), batch, direction, order=2)


def test_second_order_across_a_jump_warns():
    """Experts are chosen by rank; where the choice flips within the step the difference is not a derivative."""
    model = random_model("mixtral")
    with pytest.warns(UserWarning, match="jump within the step"):
        measure(Policy(model), random_batch(), random_direction(model), order=2)


def test_a_direction_no_token_reaches_has_zero_derivatives():
    model = random_model("llama")
    unused = torch.zeros_like(model.model.embed_tokens.weight)
    batch = random_batch()
    absent = next(t for t in range(unused.shape[0]) if t not in batch.tokens.tolist())
    unused[absent] = 1.0
    sums = measure(Policy(model), batch, Direction({"model.embed_tokens.weight": unused}))
    assert not sums.dlogp.any() and not sums.dentropy.any() and sums.entropy.any()
    with pytest.raises(ValueError, match="moves no log-probability"):
        measure(Policy(model), batch, Direction({"model.embed_tokens.weight": unused}), order=2)


def test_tied_weights_move_together():
    model = random_model("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    batch, policy = random_batch(), Policy(model)
    one = random_direction(model, names=lambda name: "embed" in name)
    v = one.tensors["model.embed_tokens.weight"]
    both = Direction({"model.embed_tokens.weight": v, "lm_head.weight": v.clone()})
    assert np.array_equal(measure(policy, batch, one).dlogp, measure(policy, batch, both).dlogp)
    with pytest.raises(ValueError, match="one tied parameter"):
        measure(policy, batch, Direction({"model.embed_tokens.weight": v, "lm_head.weight": 2 * v}))


def test_microbatches_change_nothing_and_kept_tokens_sum_to_the_rows():
    model = random_model("llama")
    batch, direction, policy = random_batch(), random_direction(model), Policy(model)
    seen = []
    whole = measure(policy, batch, direction, keep_tokens=True)
    parts = measure(policy, batch, direction, token_budget=1, progress=seen.append)
    assert sorted(seen) == sorted(n for n in batch.response_lens if n)
    for column, values in whole.columns().items():
        np.testing.assert_allclose(getattr(parts, column), values, rtol=1e-5, atol=1e-5)
    bounds = np.cumsum(batch.response_lens)[:-1]
    np.testing.assert_allclose(
        [x.sum() for x in np.split(whole.tokens.dlogp.double().numpy(), bounds)], whole.dlogp, rtol=1e-12, atol=1e-12
    )


def test_the_pass_leaves_the_model_as_it_was():
    model = random_model("mixtral", attention_dropout=0.3).train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    before = {name: p.clone() for name, p in model.named_parameters()}
    training = [m.training for m in model.modules()]
    implementations = (model.config._attn_implementation, model.config._experts_implementation)
    torch.set_float32_matmul_precision("high")
    try:
        policy, direction = Policy(model), random_direction(model)
        first = measure(policy, random_batch(), direction)
        second = measure(policy, random_batch(), direction)
        measure(policy, random_batch(), direction, eta=0.1)
        with pytest.raises(RuntimeError, match="inside"), moved_weights(policy, direction, 0.1):
            raise RuntimeError("inside")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert np.array_equal(first.dlogp, second.dlogp)  # no dropout
    assert [m.training for m in model.modules()] == training
    assert (model.config._attn_implementation, model.config._experts_implementation) == implementations
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and isinstance(p, torch.nn.Parameter) and p.requires_grad


def test_moved_weights_are_theta_plus_eta_v():
    model = random_model("gpt2")
    batch, policy, direction = random_batch(), Policy(model), random_direction(model)
    moved = measure(policy, batch, direction, eta=0.01)
    with moved_weights(policy, direction, 0.01):
        inside = measure(policy, batch)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.01 * direction.tensors[name]
    by_hand = measure(Policy(model), batch)
    for column in ("logp", "entropy"):
        assert np.array_equal(getattr(moved, column), getattr(inside, column))
        np.testing.assert_allclose(getattr(moved, column), getattr(by_hand, column), rtol=1e-6, atol=1e-6)


def test_zero_length_responses_are_rows_of_zeros():
    model = random_model("llama")
    sums = measure(Policy(model), random_batch(), random_direction(model))
    assert sums.n_tokens[0] == 0
    assert all(column[0] == 0 for column in sums.columns().values())


def test_one_rollout_has_a_slope_and_no_error_bar():
    model = random_model("llama")
    sums = measure(Policy(model), PackedBatch.from_lists([[3]], [[4, 5, 2]]), random_direction(model))
    estimate = slope(sums)
    assert np.isfinite(estimate.value) and estimate.stderr is None and estimate.stderr_reason


def test_bf16_policies_warn_where_steps_vanish():
    model = random_model("llama").to(torch.bfloat16)
    policy, batch, direction = Policy(model), random_batch(), random_direction(model)
    assert np.isfinite(measure(policy, batch, direction).dentropy).all()
    with pytest.warns(UserWarning, match="vanish"):
        measure(policy, batch, direction, eta=1e-3)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(eta=float("nan")), "eta: nan"),
        (dict(order=3), "order: 3"),
        (dict(second_order="exact"), "second_order: 'exact'"),
        (dict(direction=None, eta=0.1), "direction: None"),
        (dict(direction=None, order=1), "direction: None"),
        (dict(token_budget=0), "token_budget: 0"),
        (dict(batch=PackedBatch.from_lists([[1]], [[99]])), "rollout 0: token id 99"),
        (dict(batch=PackedBatch.from_lists([[1]], [[2] * 64])), "rollout 0: 65 tokens, expected at most 64"),
        (dict(direction=Direction({"nowhere": torch.ones(2)})), "1 of 1 names are not the policy's .nowhere"),
        (dict(direction=Direction({"model.norm.weight": torch.ones(2)})), r"model.norm.weight has shape \(2,\)"),
    ],
)
def test_bad_requests_name_the_argument(arguments, named):
    model = random_model("llama")
    good = dict(batch=random_batch(), direction=random_direction(model))
    with pytest.raises(ValueError, match=named):
        measure(Policy(model), **(good | arguments))


def test_values_that_are_not_finite_name_the_rollout():
    model = random_model("llama")
    policy, batch = Policy(model), random_batch()
    tokens = batch.tokens.tolist()
    start, stop = batch.offsets[4], batch.offsets[5]
    elsewhere = set(tokens[:start]) | set(tokens[stop:])
    special = next(t for t in range(3, LLAMA_LIKE["vocab_size"]) if t not in elsewhere)
    poisoned = batch.tokens.clone()
    poisoned[start] = special
    with torch.no_grad():
        model.model.embed_tokens.weight[special] = float("nan")
    with pytest.raises(ValueError, match="rollout 4"):
        measure(policy, dataclasses.replace(batch, tokens=poisoned))
