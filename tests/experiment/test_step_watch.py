"""A step of a plain loop: predicted, measured, and how much of it the weights took in; nothing else changes."""

from html import unescape

import numpy as np
import pytest
import torch
from models import VOCAB, random_batch, random_model
from trainers import fingerprint

from dentropy import PackedBatch, Policy, importance, measure, watch_step
from dentropy.experiment import watched_policy
from dentropy.model import memory

# The wish to see float32 copies announced is one test's; what half precision cannot do is another's.
quiet = pytest.mark.filterwarnings("ignore:model. weights are", "ignore:policy. weights are")


@pytest.fixture(autouse=True)
def two_roundings(monkeypatch):
    """Most passes of a step are for its noise floor, which other tests hold."""
    monkeypatch.setattr("dentropy.passes.noise_floor.BLOCKS", 2)


def model_and_optimizer(dtype=torch.float32, kind=torch.optim.AdamW, **settings):
    model = random_model("llama").to(dtype)
    model.train()
    optimizer = kind(model.parameters(), **dict(lr=1e-3) | settings)
    ids = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 4, 8, 2]])
    model(input_ids=ids, labels=ids).loss.backward()
    return model, optimizer


def one_token_rollouts(prompt=(5, 6, 7)) -> PackedBatch:
    """Of these the entropy at any weights is that of one distribution, whatever the importance weights."""
    return PackedBatch.from_lists([list(prompt)] * 30, [[t] for t in range(3, 33)])


def entropy_of(model, prompt=(5, 6, 7)) -> float:
    model = model.eval()
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].detach().double()
    return float(torch.distributions.Categorical(logits=logits).entropy())


def test_the_change_is_that_of_the_policy_itself_forwards_and_backwards():
    """With its sign: R after the step less R before it, whichever policy the rollouts are of."""
    model, optimizer = model_and_optimizer()
    batch, before = one_token_rollouts(), entropy_of(model)
    with watch_step(model, optimizer, batch) as step:
        optimizer.step()
    change = entropy_of(model) - before
    assert abs(change) > 0.01
    assert step.entropy == pytest.approx(before, rel=1e-5)
    assert step.measured.delta == pytest.approx(change, rel=1e-4)
    assert step.look_back_by(batch).delta == pytest.approx(change, rel=1e-4)


def test_its_own_rollouts_say_the_same_as_those_of_the_policy_that_it_was():
    model, optimizer = model_and_optimizer()
    with watch_step(model, optimizer, random_batch()) as step:
        optimizer.step()
    found = step.look_back_by(step.as_sampled())
    assert found.delta == pytest.approx(step.measured.delta, rel=1e-4) and found.ess_fraction > 0.5
    assert step.look_back_by(step.batch).delta != pytest.approx(step.measured.delta, rel=1e-2)


def test_the_prediction_is_the_taylor_expansion_of_that_change():
    """To second order: what is left over is of the third."""
    left = []
    for lr in (2e-4, 4e-4):
        model, optimizer = model_and_optimizer(lr=lr)
        before = entropy_of(model)
        with watch_step(model, optimizer, one_token_rollouts()) as step:
            optimizer.step()
        change = entropy_of(model) - before
        left.append((step.predicted.value - change) / change)
    assert 0.001 < left[0] < 0.01 and 3 < left[1] / left[0] < 5  # the third order, relative to the first


def test_half_precision_is_measured_in_float32_and_realizes_a_part_of_the_step():
    """⟨stored, intended⟩ / ‖intended‖² by hand, for an optimizer whose step is −lr·gradient."""
    model, optimizer = model_and_optimizer(torch.bfloat16, torch.optim.SGD, lr=1e-2)
    before, batch = {name: p.detach().clone() for name, p in model.named_parameters()}, random_batch()
    with pytest.warns(UserWarning, match="float32 copies, which need"), watch_step(model, optimizer, batch) as step:
        optimizer.step()
    along = square = 0.0
    for name, p in model.named_parameters():
        intended = -1e-2 * p.grad.double()
        along += float(((p.detach().double() - before[name].double()) * intended).sum())
        square += float(intended.square().sum())
    assert 0 < along / square < 0.999
    assert step.realized_fraction == pytest.approx(along / square, rel=1e-5)
    assert step.slope_intended.value != step.slope.value

    tables = [measure(Policy(model.float()), batch, keep_tokens=True)]
    model.load_state_dict(before)
    tables.insert(0, measure(Policy(model), batch, keep_tokens=True))
    assert step.measured.delta == pytest.approx(importance(*tables, weights="prefix").delta, rel=1e-5)


@quiet
def test_what_the_weights_cannot_take_in_is_seen_as_lost():
    model, optimizer = model_and_optimizer(torch.bfloat16, torch.optim.SGD, lr=1e-9)
    with watch_step(model, optimizer, random_batch()) as step:
        optimizer.step()
    assert step.realized_fraction < 1e-3 and step.slope_intended is not None


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_float32_weights_realize_all_of_it(kind):
    model, optimizer = model_and_optimizer(kind=kind)
    with watch_step(model, optimizer, random_batch()) as step:
        optimizer.step()
    assert step.realized_fraction == 1.0 and step.slope_intended is step.slope


@pytest.fixture(scope="module")
def watched():
    """A step that was taken, and how it was shown before."""
    model, optimizer = model_and_optimizer()
    with watch_step(model, optimizer, random_batch()) as step:
        before = repr(step)
        optimizer.step()
    return step, before


def test_it_is_shown_with_its_numbers(watched):
    step, before = watched
    assert "measured ΔH   not yet" in before and "realized" not in before
    predicted, measured = step.predicted, step.measured
    texts = [
        f"{len(step.batch)} rollouts of {step.batch.n_groups} prompt",
        f"{step.entropy:.3e} nats per token",
        f"{step.slope.value:.3e} ± {step.slope.stderr:.1e} nats per token per unit of η",
        f"{predicted.value:.3e} ± {predicted.stderr:.1e} nats per token",
        f"{measured.value:.3e} ± {measured.stderr:.1e} nats per token, {step.diagnostics.verdict}",
        "100.0% of the step",
    ]
    html = unescape(step._repr_html_())
    assert all(text in repr(step) and text in html for text in texts)
    assert repr(step).startswith("<StepWatch") and len(repr(step)) < 500 and html.count("<tr>") == 1 + len(texts)


def test_the_errors_are_those_of_the_linear_and_the_quadratic_prediction(watched):
    step, _ = watched
    linear, term = step.eta * step.slope.value, step.eta**2 / 2 * step.curvature.value
    assert step.error.value == pytest.approx(linear - step.measured.delta, rel=1e-12)
    assert step.quadratic_error.value == pytest.approx(linear + term - step.measured.delta, rel=1e-12)


def test_a_step_that_moves_nothing_changes_nothing():
    model, optimizer = model_and_optimizer(lr=0.0)
    with watch_step(model, optimizer, random_batch()) as step:
        optimizer.step()
    assert "moves nothing" in repr(step) and "realized" not in repr(step)
    assert step.direction is None and step.predicted is None and step.realized_fraction is None
    numbers = step.numbers()
    assert numbers["predicted_delta"] == numbers["measured_delta"] == 0.0
    assert "slope" not in numbers and "realized_fraction" not in numbers and numbers["entropy"] > 0


@quiet
def test_the_step_is_the_one_without_watching_bit_for_bit():
    found = []
    for watching in (False, True):
        model, optimizer = model_and_optimizer(torch.bfloat16)
        if watching:
            before = fingerprint(model, optimizer)
            with watch_step(model, optimizer, random_batch()):
                assert fingerprint(model, optimizer) == before
                optimizer.step()
        else:
            optimizer.step()
        found.append(fingerprint(model, optimizer))
    assert found[0] == found[1]


@quiet
@pytest.mark.parametrize("call,error", [(10, KeyboardInterrupt), (12, RuntimeError), (14, KeyboardInterrupt)])
def test_all_is_as_found_wherever_it_stops(monkeypatch, call, error):
    """A pass of the prediction, and one of the measurement, in half precision, where copies stand in for weights."""
    model, optimizer = model_and_optimizer(torch.bfloat16)
    calls, score, stepped = [], Policy.score, []

    def failing(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == call + 1:
            torch.rand(1), np.random.rand()  # noqa: NPY002
            raise error("stop")
        return score(self, *args, **kwargs)

    monkeypatch.setattr(Policy, "score", failing)
    before = fingerprint(model, optimizer)
    with pytest.raises(error), watch_step(model, optimizer, random_batch()):
        optimizer.step()
        stepped.append(fingerprint(model, optimizer))
    assert fingerprint(model, optimizer) == (stepped or [before])[0]


def test_an_error_of_the_loop_is_the_loops():
    model, optimizer = model_and_optimizer()
    before = fingerprint(model, optimizer)
    with pytest.raises(ZeroDivisionError), watch_step(model, optimizer, random_batch()) as step:
        1 / 0  # noqa: B018
    assert step.measured is None and fingerprint(model, optimizer) == before


def test_without_room_for_copies_passes_run_as_they_are(monkeypatch):
    model, optimizer = model_and_optimizer(torch.bfloat16, torch.optim.SGD, lr=1e-2)
    monkeypatch.setattr(watched_policy, "available_memory", lambda device: 1000)
    said = pytest.warns(UserWarning, match="0.00 GiB are free, so passes run in torch.bfloat16")
    with said, watch_step(model, optimizer, random_batch()) as step:
        optimizer.step()
    assert step.curvature is None and step.measured is not None and 0 < step.realized_fraction < 1


def test_a_policy_spares_the_self_check(monkeypatch):
    model, optimizer = model_and_optimizer()
    policy = Policy(model)
    monkeypatch.setattr(Policy, "__init__", None)
    with watch_step(policy, optimizer, random_batch()) as step:
        pass
    assert step.predicted.value != 0 and step.measured.delta == 0.0


def test_the_memory_of_this_machine_is_known():
    found = memory.available_memory(torch.device("cpu"))
    assert found is None or found > 2**20


def test_rollouts_outside_the_vocabulary_are_refused_before_the_step():
    model, optimizer = model_and_optimizer()
    before = fingerprint(model, optimizer)
    batch = PackedBatch.from_lists([[5]], [[VOCAB]])
    with pytest.raises(ValueError, match="outside the vocabulary"), watch_step(model, optimizer, batch):
        optimizer.step()
    assert fingerprint(model, optimizer) == before
