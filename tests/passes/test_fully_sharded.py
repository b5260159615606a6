"""Models under FSDP2 on two CPU ranks against the same models whole, in float64: passes, gradients, attributions.

Each case runs in a set of processes of its own; the tests look at what the ranks got.
"""

import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import SAVED_MODULES_LOAD, random_model, with_lora
from on_ranks import join, on_ranks
from spread import BUDGET, WORLD, batch_of, differences, direction_of, failing, in_parts, numbers, own_gradient, refused
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from dentropy import Policy, measure, sample

pytestmark = [
    pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="what this PyTorch has is refused by name"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process with a card cannot be forked"),
]
MODELS = {"llama": "llama", "tied head": "qwen2", "lora": "llama", "experts": "mixtral"}
# What is under fully_shard: layers and the whole; that, where layers stay gathered behind their forward; and what
# transformers loads in parts, with the last norm and the head as a group, of which a pass to hidden states runs a part.
WAYS = ("layers", "layers, kept", "loaded")


def model_of(kind):
    model = random_model(MODELS[kind])
    return (with_lora(model, r=1) if kind == "lora" else model).double()  # of a row some ranks have none


def sharded(kind, way, directory):
    """The policy; `directory` is for the files that it is loaded from."""
    model = model_of(kind)
    if way == "loaded":
        if dist.get_rank() == 0:
            model.save_pretrained(f"{directory}/model")
        dist.barrier()
        return Policy.from_pretrained(f"{directory}/model", torch.float64, "cpu", shard=True)
    mesh = init_device_mesh("cpu", (WORLD,))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=way != "layers, kept")
    return Policy(fully_shard(model, mesh=mesh))


def alone(kind, quick):
    model = model_of(kind)
    return numbers(Policy(model), direction_of(model), quick) | {"own": own_gradient(model)}


def refusals(policy, direction):
    """What each of several things is refused with."""
    mesh, batch = init_device_mesh("cpu", (WORLD,)), batch_of(0, 12)
    mixed, parts, parallel = model_of("llama"), model_of("llama"), model_of("llama")
    fully_shard(mixed, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(parts.model.layers[0], mesh=mesh)
    weight = parallel.model.norm.weight
    parallel.model.norm.weight = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    found = {
        "mixed precision": refused(lambda: Policy(mixed)),
        "parts": refused(lambda: Policy(parts)),
        "by no plan": refused(lambda: Policy(parallel)),
        "nested": refused(lambda: measure(policy, batch, direction, order=2, second_order="nested")),
        "sample": refused(lambda: sample(policy, [[3]], per_prompt=2, max_new_tokens=3)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "hidden", failing(torch.OutOfMemoryError("CUDA out of memory.")))
        found["memory"] = refused(lambda: measure(policy, batch, token_budget=BUDGET))
    return found


def run_rank(rank, directory, kind, way, quick):
    join(rank, WORLD, directory)
    policy, direction = sharded(kind, way, directory), direction_of(model_of(kind))
    model = policy.model
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    if way == "loaded":
        direction = in_parts(direction, model, f"{directory}/v.safetensors")
    found = numbers(policy, direction, quick)
    found["shown"] = repr(policy)
    if not quick and way == "layers":
        with pytest.MonkeyPatch.context() as patch:  # in the middle of a pass, on every rank
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            patch.setattr(inner.model.layers[1].mlp, "forward", failing(KeyError("a bug")))
            found["failed"] = refused(lambda: measure(policy, batch_of(0, 12), direction, token_budget=BUDGET))
        again = measure(policy, batch_of(0, 12), direction, order=1, token_budget=BUDGET).columns()
        found["again"] = {name: np.array_equal(x, found[f"1 0.0 {name}"]) for name, x in again.items()}
    after = dict(model.named_parameters())
    found["as before"] = before.keys() == after.keys() and all(
        torch.equal(x, after[name].to_local()) and after[name].grad is None for name, x in before.items()
    )
    found["own"] = own_gradient(model)
    if not quick and (kind, way) == ("llama", "layers"):
        found["refusals"] = refusals(policy, direction)
    with open(f"{directory}/{rank}.pickle", "wb") as file:
        pickle.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


CASES = [("llama", "layers", True)]
CASES += [
    pytest.param((kind, way, False), marks=pytest.mark.slow)
    for kind in MODELS
    for way in WAYS
    if way != "loaded" or (SAVED_MODULES_LOAD and kind != "lora")  # older ones do not load in parts
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: ", ".join(case[:2]) + ", quick" * case[2])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def want(case):
    kind, _, quick = case
    return alone(kind, quick)


@pytest.fixture(scope="module")
def results(case, tmp_path_factory):
    """What each rank got."""
    directory = tmp_path_factory.mktemp("sharded")
    return on_ranks(run_rank, WORLD, directory, directory, *case)


def test_numbers_are_those_of_the_whole_model(want, results):
    for result in results:
        off = differences(result, want)
        # A noise floor is of the size of rounding errors, which it is made of: what is common is its random numbers.
        assert off.pop("floors", 0.0) <= 1e-4
        assert {name: x for name, x in off.items() if not x <= 1e-12} == {}


def test_every_rank_gets_the_same(results):
    first, second = ({n: x.tobytes() for n, x in result.items() if isinstance(x, np.ndarray)} for result in results)
    assert first == second and "sharded over ranks" in results[0]["shown"]


def test_weights_come_back_bit_for_bit_and_train_on(want, results):
    for result in results:
        assert result["as before"]
        assert result["own"].keys() == want["own"].keys()
        for name, g in want["own"].items():
            np.testing.assert_allclose(result["own"][name], g, rtol=0, atol=1e-12 * np.abs(g).max())


def test_a_pass_that_fails_leaves_nothing_behind(case, results):
    for result in results if case[1:] == ("layers", False) else []:
        assert result["failed"] == "KeyError: 'a bug'"
        assert all(result["again"].values())


def test_what_cannot_be_handled_is_refused_by_name(case, results):
    for rank, result in enumerate(results if case == ("llama", "layers", False) else []):
        found = result["refusals"]
        assert found["mixed precision"].startswith("ValueError: model: sharded with MixedPrecisionPolicy(param_dtype")
        assert "under no fully_shard, and other parts are" in found["parts"]
        assert "model.norm is tensor parallel by no plan of transformers" in found["by no plan"]
        assert found["nested"] == "ValueError: second_order: 'nested' for sharded weights, expected 'difference'"
        assert found["sample"].startswith("ValueError: policy: sharded weights, expected whole ones to sample from")
        assert f"do not fit into memory on rank {rank}, and with sharded weights" in found["memory"]
