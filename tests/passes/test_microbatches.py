import gc
import weakref

import numpy as np
import pytest
import torch
from crosses import crossed
from models import InFloat64, quiet_fallback, random_batch, random_direction, random_model

from dentropy import PackedBatch, Policy, measure
from dentropy.passes.microbatches import AUTO_START, SAFE_SHARE, TokenBudget, walk
from dentropy.passes.reverse_mode import gradient

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


pytestmark = quiet_fallback


def batch_of(totals, prompt=1):
    return PackedBatch.from_lists([[1] * prompt] * len(totals), [[1] * (n - prompt) for n in totals])


def packing(batch, budget) -> list[list[int]]:
    """The rollouts of every microbatch, in the order of the walk."""
    return [rollouts for _, rollouts in walk(batch, TokenBudget(budget, CPU), lambda m: m.rollouts.tolist())]


def picked(batch, order) -> PackedBatch:
    """The rollouts in another order."""
    return PackedBatch.from_lists(
        [batch.prompt(i) for i in order],
        [batch.response(i) for i in order],
        group=batch.group[order],
        temperature=batch.temperature,
    )


class TestPacking:
    def test_the_longest_first_then_the_longest_that_fits(self):
        batch = batch_of([4, 5, 10, 2, 3])
        assert packing(batch, 10) == [[2], [1, 0], [4, 3]]
        assert packing(batch, 7) == [[2], [1, 3], [0, 4]]
        assert packing(batch, 1) == [[2], [1], [0], [4], [3]]

    def test_rollouts_without_a_response_are_left_out(self):
        assert packing(batch_of([3, 2, 5], prompt=2), 100) == [[2, 0]]

    @pytest.mark.parametrize("budget", [600, 2000, 10_000])
    def test_the_budget_is_filled_and_no_rollout_lost(self, budget):
        rng = np.random.default_rng(0)
        totals = np.minimum(rng.lognormal(4.5, 0.8, 1000).astype(int) + 2, 1500)
        found = packing(batch_of(totals), budget)
        assert sorted(i for rollouts in found for i in rollouts) == list(range(1000))
        used = [totals[rollouts].sum() for rollouts in found]
        assert all(n <= budget or len(rollouts) == 1 for n, rollouts in zip(used, found))
        # No packing has fewer microbatches than this: the rollouts above the budget alone, the rest without a gap.
        least = (totals > budget).sum() + -(-totals[totals <= budget].sum() // budget)
        assert least <= len(found) <= least + 1

    def test_a_large_batch_in_small_microbatches_is_packed_at_once(self):
        """Eight thousand rollouts: a search over all that are left, in every microbatch, would take long."""
        assert len(packing(batch_of([30, 100] * 4_000), 100)) == 4_000 + -(-4_000 // 3)


@crossed(lambda name, order: (name, order) in (("llama", 2), ("mamba2", 1)), name=["llama", "mamba2"], order=[1, 2, 0])
def test_results_do_not_depend_on_budget_or_order(name, order):
    model = random_model(name).double()
    batch, direction = random_batch(rollouts=14, temperature=0.8), random_direction(model)
    with InFloat64():
        policy = Policy(model)
        assert policy.packs == (name == "llama")
        settings = dict(order=order, second_order="difference", keep_tokens=True)
        whole = measure(policy, batch, direction, **settings)
        shuffle = np.random.default_rng(1).permutation(len(batch))
        others = [(batch, np.arange(len(batch)), budget) for budget in (1, 17, 40)]
        others += [(picked(batch, shuffle), shuffle, budget) for budget in (25, "auto")]
        for rollouts, where, budget in others:
            found = measure(policy, rollouts, direction, token_budget=budget, **settings)
            assert found.rollout.tolist() == list(range(len(batch)))
            for column in set(whole.columns()) - {"rollout"}:
                values = whole.columns()[column]
                scale = np.sqrt(np.mean(np.square(values)))
                # The difference of passes is divided by the square of a small step, which costs it half its digits.
                bar = 1e-5 if column.startswith("d2") or column.endswith("_2") else 1e-12
                assert np.abs(getattr(found, column) - values[where]).max() <= bar * scale, (column, budget)
            bounds = batch.response_offsets
            tokens = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in where])
            torch.testing.assert_close(found.tokens.logp, whole.tokens.logp[tokens], rtol=1e-12, atol=1e-12)


def real_shortage():
    """The error PyTorch itself raises on a CPU, for 4 EiB."""
    try:
        torch.empty(2**62, dtype=torch.uint8)
    except RuntimeError as error:
        return error


def card_shortage():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def kernel_shortage():
    """Triton's, of a kernel that wants more shared memory than the card has; it is no RuntimeError."""
    return pytest.importorskip("triton.runtime.errors").OutOfResources(136 * 1024, 99 * 1024, "shared memory")


def fail_above(policy, monkeypatch, limit, error=card_shortage) -> list[int]:
    """Makes the policy run out of memory above `limit` tokens; returns the list of the token counts it is given."""
    asked = []

    def limited(run):
        def running(row):
            asked.append(len(row.tokens))
            if len(row.tokens) > limit:
                raise error()
            return run(row)

        return running

    monkeypatch.setattr(policy, "hidden", limited(policy.hidden))
    monkeypatch.setattr(policy, "logits", limited(policy.logits))
    return asked


class TestOutOfMemory:
    @pytest.mark.parametrize(
        "settings, error",
        [
            (dict(order=0), real_shortage),
            (dict(order=1), kernel_shortage),
            (dict(order=2), card_shortage),
            (dict(order=2, second_order="nested"), card_shortage),
        ],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )
    def test_nothing_is_lost(self, settings, error, monkeypatch):
        model = random_model("llama").double()
        batch, direction = random_batch(rollouts=14), random_direction(model)
        with InFloat64():
            policy = Policy(model)
            whole = measure(policy, batch, direction, **settings)
            asked, counts = fail_above(policy, monkeypatch, 30, error), []
            with pytest.warns(UserWarning, match="out of memory, went on with") as said:
                found = measure(policy, batch, direction, token_budget=100, progress=counts.append, **settings)
        # 100 tokens fail, then half of what they held, about 50; about 25 fit. Said once, whatever passes follow.
        assert [n > 30 for n in asked[:3]] == [True, True, False] and max(asked[2:]) <= 30 and len(said) == 1
        budget = int(str(said[0].message).split("went on with ")[1].split()[0])
        assert max(asked[2:]) <= budget <= 25
        passes = 3 if settings == dict(order=2) else 1
        assert sum(counts) == passes * batch.n_tokens
        for column, values in whole.columns().items():
            scale = np.sqrt(np.mean(np.square(values)))
            by_difference = settings == dict(order=2) and (column.startswith("d2") or column.endswith("_2"))
            bar = 1e-5 if by_difference else 1e-8
            assert np.abs(getattr(found, column) - values).max() <= bar * scale, column

    def test_nothing_is_counted_twice_in_a_gradient(self, monkeypatch):
        model = random_model("llama").double()
        batch, rng = random_batch(rollouts=14), np.random.default_rng(0)
        a, b = rng.normal(size=(2, batch.n_tokens))
        with InFloat64():
            policy, parameters = Policy(model), list(model.parameters())
            whole, counts = gradient(policy, batch, parameters, a, b), []
            fail_above(policy, monkeypatch, 30)
            with pytest.warns(UserWarning, match="out of memory, went on with"):
                parts = gradient(policy, batch, parameters, a, b, token_budget=60, progress=counts.append)
        assert sum(counts) == batch.n_tokens
        for x, y in zip(parts, whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)

    def test_what_is_done_is_kept(self):
        """The third microbatch fails: the two before it are not run again, its own rollouts are."""
        batch, runs = batch_of([5] * 12), []

        def run(microbatch):
            runs.append(microbatch.rollouts.tolist())
            if len(runs) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return "done"

        budget = TokenBudget(20, CPU)
        with pytest.warns(UserWarning, match="went on with 10 tokens"):
            done = [(microbatch.rollouts.tolist(), result) for microbatch, result in walk(batch, budget, run)]
        assert [len(rollouts) for rollouts in runs] == [4, 4, 4, 2, 2] and budget.tokens == 10
        kept = [i for rollouts, result in done for i in rollouts if result == "done"]
        assert sorted(kept) == list(range(12)) and sorted(runs[3] + runs[4]) == sorted(runs[2])

    def test_a_rollout_that_does_not_fit_alone_is_named(self, monkeypatch):
        policy = Policy(random_model("llama"))
        batch = PackedBatch.from_lists([[1]] * 3, [[3] * 5, [3] * 40, [3] * 7])
        fail_above(policy, monkeypatch, 30)
        with pytest.raises(MemoryError, match=r"rollout 1: its 41 tokens do not fit .*Tried to allocate 2 GiB"):
            measure(policy, batch)

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), MemoryError("host"), ValueError("out of memory")],
    )
    def test_other_errors_are_not_taken_for_it(self, error, monkeypatch):
        policy = Policy(random_model("llama"))
        asked = fail_above(policy, monkeypatch, 0, lambda: error)
        with pytest.raises(type(error)) as raised:
            measure(policy, random_batch())
        assert raised.value is error and len(asked) == 1

    def test_the_failed_microbatch_is_freed_before_the_next(self):
        failed = []

        def run(microbatch):
            assert not failed or failed.pop()() is None
            if len(microbatch.rollouts) > 2:
                activations = torch.zeros(1000)
                failed.append(weakref.ref(activations))
                error = torch.OutOfMemoryError("CUDA out of memory")
                activations.cycle = error  # what only the garbage collector undoes: error, traceback, frame, tensor
                raise error

        gc.disable()
        try:
            with pytest.warns(UserWarning, match="went on with 10 tokens"):
                assert len(list(walk(batch_of([5] * 4), TokenBudget(20, CPU), run))) == 2
        finally:
            gc.enable()

    def test_a_microbatch_that_is_kept_is_not_held_on_to(self):
        """A gradient is as large as the model: one that is added up must not stay alive through the next pass."""
        last, n = [], 0

        def run(microbatch):
            assert not last or last.pop()() is None
            result = torch.zeros(1000)
            last.append(weakref.ref(result))
            return result

        for _, result in walk(batch_of([5] * 4), TokenBudget(5, CPU), run):
            n += len(result) // 1000
            del result
        assert n == 4

    def test_a_gradient_that_is_added_up_is_not_held_on_to(self, monkeypatch):
        model, taken, grad = random_model("llama"), [], torch.autograd.grad

        def watched(*arguments, **settings):
            assert all(part() is None for part in taken)
            parts = grad(*arguments, **settings)
            taken[:] = [weakref.ref(part) for part in parts if part is not None]
            return parts

        monkeypatch.setattr(torch.autograd, "grad", watched)
        batch = random_batch()
        weights = np.ones(batch.n_tokens)
        gradient(Policy(model), batch, list(model.parameters()), weights, weights, token_budget=1)
        assert taken


class TestBudget:
    @pytest.mark.parametrize("request_", [0, -1, 2.5, "4096", "lots", None])
    def test_what_is_no_budget_is_refused(self, request_):
        with pytest.raises(ValueError, match=f"token_budget: {request_!r}, expected 'auto' or a whole number"):
            TokenBudget(request_, CPU)

    def test_auto_is_a_number_on_a_cpu(self):
        budget = TokenBudget("auto", CPU)
        with budget.trial(10):
            pass
        assert budget.tokens == AUTO_START

    @pytest.fixture
    def card(self, monkeypatch):
        """A card of 1,000,000 bytes: 400,000 the driver's, 300,000 kept by PyTorch, 200,000 of them in use."""
        card = dict(memory_allocated=200_000, max_memory_allocated=900_000, memory_reserved=300_000)
        for name in card:
            monkeypatch.setattr(torch.cuda, name, lambda device, name=name: card[name])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400_000, 1_000_000))
        monkeypatch.setattr(
            torch.cuda,
            "reset_peak_memory_stats",
            lambda device: card.update(max_memory_allocated=card["memory_allocated"]),
        )
        return card

    def test_auto_fills_a_safe_share_of_what_is_free_on_a_card(self, card):
        budget = TokenBudget("auto", CUDA)
        assert budget.tokens == AUTO_START
        with budget.trial(50):
            card["max_memory_allocated"] += 5_000  # 100 bytes a token; an earlier peak does not count
        assert budget.tokens == int(SAFE_SHARE * (400_000 + 300_000 - 200_000) / 100)
        with budget.trial(50):
            card["max_memory_allocated"] += 500_000
        assert budget.tokens == 4000  # only the first is measured

    def test_after_a_shortage_nothing_is_measured_upwards(self, card):
        budget = TokenBudget("auto", CUDA)
        with pytest.raises(torch.OutOfMemoryError), budget.trial(50):
            raise torch.OutOfMemoryError
        assert budget.tokens == AUTO_START
        budget.lower(50)
        with pytest.warns(UserWarning, match="went on with 25 tokens"), budget.trial(20):
            card["max_memory_allocated"] += 1
        assert budget.tokens == 25

    def test_a_number_is_not_measured(self, card):
        budget = TokenBudget(64, CUDA)
        with budget.trial(50):
            assert card["max_memory_allocated"] == 900_000
        assert budget.tokens == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnCuda:
    def test_auto_learns_what_fits(self):
        policy = Policy(random_model("llama").to(CUDA))
        budget = TokenBudget("auto", CUDA)
        batch = batch_of([40] * 300)
        for _, result in walk(batch, budget, lambda m: torch.empty(10_000 * len(m.rollouts), device=CUDA)):
            del result
        free = torch.cuda.mem_get_info(CUDA)[0]
        assert 0.5 * free < budget.tokens * 1000 < free  # 1,000 bytes a token
        direction = random_direction(policy.model)
        few, auto = (measure(policy, random_batch(), direction, token_budget=n) for n in (40, "auto"))
        assert np.abs(auto.dentropy - few.dentropy).max() <= 1e-5 * np.sqrt(np.mean(np.square(few.dentropy)))

    def test_a_real_shortage_is_survived(self):
        torch.cuda.empty_cache()
        rows = torch.cuda.mem_get_info(CUDA)[1] // 10  # bytes a rollout: half of the twelve do not fit together

        def run(microbatch):
            return torch.empty(rows * len(microbatch.rollouts), dtype=torch.uint8, device=CUDA).numel()

        with pytest.warns(UserWarning, match="out of memory, went on with"):
            walked = list(walk(batch_of([5] * 12), TokenBudget(60, CUDA), run))
        assert sorted(i for microbatch, _ in walked for i in microbatch.rollouts) == list(range(12))
