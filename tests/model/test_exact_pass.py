"""The self-check: packs and splits_head are what reproduces the model, and nothing hides that they do not."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from models import CONFIGS, LLAMA_LIKE, SCALED, InFloat64, random_batch, random_direction, random_model
from torch import nn

from dentropy import PackedBatch, Policy, measure
from dentropy.passes.reverse_mode import gradient


@pytest.mark.parametrize("name", [n for n in [*CONFIGS, SCALED[-1]] if n != "mamba2"])
def test_known_architectures_pack_and_split_their_head(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        policy = Policy(random_model(name))
    assert policy.packs and policy.splits_head and policy.vocab_size == 40


def test_a_model_that_cannot_be_packed_says_so():
    with pytest.warns(UserWarning, match="one at a time"):
        policy = Policy(random_model("mamba2"))
    assert not policy.packs and policy.splits_head


class NoisyHead(nn.Linear):
    """A head that is more than a matrix product: nothing about it can be read from a weight."""

    def forward(self, x):
        return super().forward(x) + 0.1 * super().forward(x).sin()


def test_an_unusual_head_goes_through_the_models_own_logits():
    model = random_model("llama")
    plain = measure(Policy(model), random_batch(), random_direction(model))
    model.lm_head.__class__ = NoisyHead
    with pytest.warns(UserWarning, match="own head"):
        policy = Policy(model)
    assert policy.packs and not policy.splits_head
    step, batch, direction = 1e-3, random_batch(), random_direction(model)
    sums = measure(policy, batch, direction)
    plus, minus = measure(policy, batch, direction, eta=step), measure(policy, batch, direction, eta=-step)
    difference = (plus.entropy - minus.entropy) / (2 * step)
    assert abs(sums.dentropy - difference).max() < 2e-3 * abs(difference).max()
    assert abs(sums.entropy - plain.entropy).max() > 1e-3


def test_an_unusual_head_in_half_precision_is_refused():
    model = random_model("llama").to(torch.bfloat16)
    model.lm_head.__class__ = NoisyHead
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        Policy(model)


class Mixes(nn.Module):
    """Stands in for a layer that mixes positions: those before, in a way packed rows cannot follow, or all of them."""

    def __init__(self, inner, mixed):
        super().__init__()
        self.inner, self.mixed = inner, mixed

    def forward(self, x):
        return self.inner(x) + self.mixed(x)


def test_mixing_across_a_packed_row_is_found():
    model = random_model("llama")
    model.model.layers[0].mlp = Mixes(model.model.layers[0].mlp, lambda x: x.cumsum(1))
    with pytest.warns(UserWarning, match="one at a time"):
        assert not Policy(model).packs


def test_models_that_see_later_tokens_are_refused():
    """As Doge's mixture of experts does, whose router takes [tokens, 2] for [2, tokens]."""
    model = random_model("llama")
    model.model.layers[1].mlp = Mixes(model.model.layers[1].mlp, lambda x: x.mT.reshape(x.shape))
    with pytest.raises(ValueError, match="policy: llama: logits of a position change with the tokens after it"):
        Policy(model)
    with pytest.warns(UserWarning, match="unless torch.bfloat16 is to blame"):
        Policy(model.to(torch.bfloat16))


def test_weights_that_are_not_finite_are_named():
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="weights that are not finite in model.layers.1.mlp.up_proj.weight"):
        Policy(model)


@pytest.mark.parametrize(
    "config, settings",
    [
        ("PhimoeConfig", dict(sliding_window=16, num_local_experts=4)),
        (
            "Phi3Config",
            dict(
                original_max_position_embeddings=20,
                rope_parameters=dict(
                    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4
                ),
            ),
        ),
    ],
    ids=["a window in the mask alone", "rope by the longest of the row"],
)
def test_models_packing_would_change_run_one_sequence_at_a_time(config, settings):
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(LLAMA_LIKE | settings)))
    with pytest.warns(UserWarning, match="one at a time"):
        policy = Policy(model)
    batch = PackedBatch.from_lists([[5], [6]], [[7, 9, 4] * 13, [8, 9, 10]])
    whole, alone = (measure(policy, batch, token_budget=budget) for budget in (4096, 1))
    assert abs(whole.logp - alone.logp).max() < 1e-4
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.tensor([batch.prompt(0) + batch.response(0)[:-1]])
        logp = torch.log_softmax(model.eval()(input_ids=ids, use_cache=False).logits[0], -1)
    expected = logp.gather(-1, torch.tensor(batch.response(0))[:, None]).sum()
    assert whole.logp[0] == pytest.approx(float(expected), abs=1e-3)


class Masked(nn.Linear):
    """A vocabulary of 36 in a head of 40 rows."""

    mask = -torch.inf

    def forward(self, x):
        z = super().forward(x)
        return torch.where(torch.arange(z.shape[-1]) < 36, z, self.mask)


class FarMasked(Masked):
    mask = -1e9


def own_logp(model, batch) -> list[float]:
    """One rollout at a time through the model's own forward."""
    sums = []
    for i in range(len(batch)):
        ids, n = torch.tensor([batch.prompt(i) + batch.response(i)]), len(batch.prompt(i))
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, n - 1 : -1].double(), -1)
        sums.append(float(logp.gather(-1, ids[0, n:, None]).sum()))
    return sums


@pytest.mark.parametrize("head", [Masked, FarMasked])
class TestAMaskedVocabulary:
    def test_does_not_hide_that_packing_leaks(self, head):
        model = random_model("mamba2")
        model.lm_head.__class__ = head
        batch = PackedBatch.from_lists([[5, 6]] * 3, [[7, 9, 2], [9, 10, 2], [11, 3, 2]])
        with pytest.warns(UserWarning, match="one at a time"):
            policy = Policy(model)
        np.testing.assert_allclose(measure(policy, batch).logp, own_logp(model, batch), rtol=1e-5)

    def test_does_not_hide_a_layer_that_looks_ahead(self, head):
        model = random_model("llama")
        model.model.layers[1].mlp = Mixes(model.model.layers[1].mlp, lambda x: x.flip(1))
        model.lm_head.__class__ = head
        with pytest.raises(ValueError, match="change with the tokens after it"):
            Policy(model)

    @pytest.mark.filterwarnings("ignore:policy. its head is not a plain matrix")
    def test_contributes_nothing_forward_or_in_reverse(self, head):
        model = random_model("llama").double()
        direction = random_direction(model)
        batch = random_batch(temperature=0.8)
        batch = dataclasses.replace(batch, tokens=batch.tokens.clamp(max=35))
        a, b = np.random.default_rng(0).normal(size=(2, batch.n_tokens))
        small = random_model("llama", vocab_size=36).double()
        small.load_state_dict({name: x[:36] if x.shape[0] == 40 else x for name, x in model.state_dict().items()})
        cut = {name: v[:36] if v.shape[0] == 40 else v for name, v in direction.tensors.items()}
        model.lm_head.__class__ = head
        with InFloat64():
            policy = Policy(model)
            assert policy.packs and not policy.splits_head
            sums = measure(policy, batch, direction)
            expected = measure(Policy(small), batch, type(direction)(cut))
            for column, values in expected.columns().items():
                np.testing.assert_allclose(getattr(sums, column), values, rtol=1e-9, atol=1e-9)
            pairs = policy.moving(direction)
            gradients = gradient(policy, batch, [p for p, _ in pairs], a, b)
            stats = measure(policy, batch, direction, keep_tokens=True).tokens
        reverse = sum(float((g * v).sum()) for g, (_, v) in zip(gradients, pairs, strict=True))
        assert reverse == pytest.approx(float(a @ stats.dentropy.numpy() + b @ stats.dlogp.numpy()), rel=1e-9)


@pytest.mark.parametrize("column", ["logp", "entropy"])
def test_what_is_checked_is_the_function_that_passes_call(column, monkeypatch):
    """Off by a thousandth in one row, it is no pass."""
    score = Policy.score

    def off(self, *arguments, **settings):
        stats = score(self, *arguments, **settings)
        getattr(stats, column)[3] += 1e-3
        return stats

    monkeypatch.setattr(Policy, "score", off)
    with pytest.raises(ValueError, match="no pass reproduces the model's own logits"):
        Policy(random_model("llama"))


@pytest.mark.parametrize("name", SCALED)
def test_a_constant_of_the_logits_that_is_missed_is_found(name, monkeypatch):
    model = random_model(name)
    monkeypatch.setattr("dentropy.model.head.Head.transform", lambda self, t: dict(temperature=t, softcap=self.softcap))
    with pytest.warns(UserWarning, match="own head"):
        assert not Policy(model).splits_head


class Waits(type(random_model("llama"))):
    """Adds to all logits but one once it has seen a token: a mind of its own."""

    def forward(self, input_ids, **settings):
        out = super().forward(input_ids=input_ids, **settings)
        seen = (input_ids == 39).cumsum(-1) > 0
        out.logits[..., 5] += seen
        return out


class TestTheFirstRollouts:
    def test_find_a_model_that_waits_for_something_in_its_input(self, monkeypatch):
        model = random_model("llama")
        model.__class__ = Waits
        monkeypatch.setattr("numpy.random.default_rng", _Without39)
        policy = Policy(model)
        monkeypatch.undo()
        batch = PackedBatch.from_lists([[9, 39, 6]] * 2, [[7, 8], [9]])
        a, b = np.ones((2, batch.n_tokens))
        for first in (lambda: measure(policy, batch), lambda: gradient(policy, batch, [model.lm_head.weight], a, b)):
            with pytest.raises(ValueError, match="policy: its own forward and the pass differ on these rollouts"):
                first()

    def test_are_looked_at_once_and_a_part_of_them(self, monkeypatch):
        policy, seen = Policy(random_model("llama")), []
        own_logits = Policy.own_logits
        monkeypatch.setattr(Policy, "own_logits", lambda self, row: seen.append(row) or own_logits(self, row))
        batch = PackedBatch.from_lists([[i % 37 + 3] * 60 for i in range(30)], [[7, 8, 9]] * 30)
        assert np.array_equal(measure(policy, batch).logp, measure(policy, batch).logp)
        assert [row.bounds for row in seen] == [[0, 63]] * 3

    @pytest.mark.parametrize("name, dtype", [("mixtral", torch.float32), ("llama", torch.bfloat16)])
    def test_warn_where_rounding_may_be_to_blame(self, name, dtype, monkeypatch):
        policy = Policy(random_model(name).to(dtype))
        monkeypatch.setattr("dentropy.model.exact_pass._Own.difference", lambda self, found: 1.0)
        with pytest.warns(UserWarning, match="on these rollouts .* unless .* is to blame"):
            measure(policy, random_batch())


class _Without39:
    def __init__(self, seed):
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def integers(self, high, size):
        return self.generator.integers(39, size=size)
