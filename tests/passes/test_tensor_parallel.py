"""Tensor parallel models on two CPU ranks against the same models whole, in float64: passes, gradients, attributions.

Each case runs in a set of processes of its own; the tests look at what the ranks got.
"""

import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import SAVED_MODULES_LOAD, InFloat64, random_model, with_lora
from on_ranks import join, on_ranks
from spread import BUDGET, WORLD, batch_of, differences, direction_of, failing, in_parts, numbers, own_gradient, refused
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dentropy import Policy, measure, sample
from dentropy.model.shards import own_part
from dentropy.passes.noise_floor import _rounded_otherwise

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process with a card cannot be forked")
# Rows that two ranks cannot have as many of each; older transformers refuse such a head.
ODD = {"vocab_size": 41 if SAVED_MODULES_LOAD else 40}
MODELS = {
    "llama": ("llama", {}),
    "tied head": ("qwen2", ODD),
    "lora": ("llama", {}),
    "experts": ("mixtral", ODD | {"tie_word_embeddings": True}),
    "query norms": ("qwen3", {}),  # which are whole, and each rank runs them on its own heads
    "put together": ("phi3", {}),  # columns, for products packed into one matrix; rows, of inputs that are whole
    "biases": ("starcoder2", {}),
    "head alone": ("llama", {}),  # by torch's own styles, which put hooks around it
    "bare head": ("llama", {}),  # which has no forward that goes with its weight
}
OF_TORCH = ("head alone", "bare head")
OF_TRANSFORMERS = [kind for kind in MODELS if kind not in OF_TORCH]
TRAINED = [kind for kind in OF_TRANSFORMERS if kind != "lora"] + ["head alone"]  # PEFT's forwards fail in training
# Sums over ranks round otherwise than whole ones, as those do with other weights: how often a number may be as far off
# as it is where one weight in six of the whole model is the next number to it. A second difference divides the rounding
# of values by the square of its step; a step of AdamW divides that of gradients near 0 by their size.
TIMES_ROUNDING = 10


def model_of(kind):
    name, changes = MODELS[kind]
    model = random_model(name, **changes)
    return (with_lora(model, r=2) if kind == "lora" else model).double()


def parallel(kind, directory):
    """The model, cut as people do."""
    model = model_of(kind)
    if kind not in OF_TRANSFORMERS:
        mesh = init_device_mesh("cpu", (WORLD,))
        if kind == "head alone":
            parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
        else:
            weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
            model.lm_head.weight = torch.nn.Parameter(weight)
        return model
    base = random_model("llama").double() if kind == "lora" else model
    if dist.get_rank() == 0:
        base.save_pretrained(f"{directory}/model")
        if kind == "lora":
            model.save_pretrained(f"{directory}/adapter")
    dist.barrier()
    found = loaded(f"{directory}/model")
    if kind == "lora":
        import peft

        found = peft.PeftModel.from_pretrained(found, f"{directory}/adapter", is_trainable=True).eval()
    return found


def loaded(folder):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=WORLD, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=config)


def numbers_in_float64(policy, direction, quick):
    with InFloat64():  # the router's softmax too
        return numbers(policy, direction, quick)


def alone(kind, quick):
    model = model_of(kind)
    return numbers_in_float64(Policy(model), direction_of(model), quick) | {"own": own_gradient(model)}


def rounded(policy):
    """Every weight as the noise floor moves it, by name."""
    makes = _rounded_otherwise(policy, torch.Generator().manual_seed(0))
    return {name: makes[id(p)](own_part(p.detach())) for name, p in policy.model.named_parameters()}


def rounding(kind, want):
    """By name, how far off the whole model's numbers are where its weights are rounded otherwise."""
    model = model_of(kind)
    with torch.no_grad():
        for name, values in rounded(Policy(model)).items():
            model.get_parameter(name).copy_(values)
    return differences(numbers_in_float64(Policy(model), direction_of(model_of(kind)), False), want)


def refusals(policy, direction, directory):
    """What each of several things is refused with."""
    batch, other, mesh = batch_of(0, 12), batch_of(dist.get_rank(), 12), init_device_mesh("cpu", (WORLD,))
    grid = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("fsdp", "tp"))

    def with_weight(place, mesh, placements):
        model = model_of("llama")
        weight = model.get_submodule(place).weight
        model.get_submodule(place).weight = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, placements))
        return model

    reduced, hooked, drifted, fresh = (loaded(f"{directory}/model") for _ in range(4))
    reduced.tp_plan = reduced.tp_plan | {"model.layers.*.mlp": "all_reduce"}
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        drifted.model.norm.weight += dist.get_rank()
    found = {
        "no plan": refused(lambda: Policy(with_weight("model.layers.0.mlp.up_proj", mesh, [Shard(0)]))),
        "head by columns": refused(lambda: Policy(with_weight("lm_head", mesh, [Shard(1)]))),
        "mesh": refused(lambda: Policy(with_weight("lm_head", grid, [Shard(0), Replicate()]))),
        "style": refused(lambda: Policy(reduced)),
        "hooks": refused(lambda: Policy(hooked)),
        "compiled": refused(lambda: Policy(fresh, compile_layers=True)),
        "drifted": refused(lambda: measure(Policy(drifted), batch)),
        "rollouts": refused(lambda: measure(Policy(fresh), other)),
        "later rollouts": refused(lambda: measure(policy, other)),
        "nested": refused(lambda: measure(policy, batch, direction, order=2, second_order="nested")),
        "sample": refused(lambda: sample(policy, [[3]], per_prompt=2, max_new_tokens=3)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "hidden", failing(torch.OutOfMemoryError("CUDA out of memory.")))
        found["memory"] = refused(lambda: measure(policy, batch, token_budget=BUDGET))
    return found


def run_rank(rank, directory, kind, quick):
    join(rank, WORLD, directory)
    model, direction = parallel(kind, directory), direction_of(model_of(kind))
    policy, inner = Policy(model), model.get_base_model() if hasattr(model, "get_base_model") else model
    before = {name: own_part(p.detach()).clone() for name, p in model.named_parameters()}
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    direction = in_parts(direction, model, f"{directory}/v.safetensors")
    found = numbers_in_float64(policy, direction, quick)
    found["shown"] = repr(policy)
    if not quick:
        want = rounded(Policy(model_of(kind)))
        parts = {
            name: distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None).to_local()
            if hasattr(p := model.get_parameter(name), "placements")
            else x
            for name, x in want.items()
        }
        found["rounded"] = {name: torch.equal(x, parts[name]) for name, x in rounded(policy).items()}
        with pytest.MonkeyPatch.context() as patch:  # in the middle of a pass, on every rank
            patch.setattr(inner.model.layers[1].mlp, "forward", failing(KeyError("a bug")))
            found["failed"] = refused(lambda: measure(policy, batch_of(0, 12), direction, token_budget=BUDGET))
        with InFloat64():
            again = measure(policy, batch_of(0, 12), direction, order=1, token_budget=BUDGET).columns()
        found["again"] = {name: np.array_equal(x, found[f"1 0.0 {name}"]) for name, x in again.items()}
    after = dict(model.named_parameters())
    found["as before"] = before.keys() == after.keys() and all(
        torch.equal(x, own_part(after[name].detach())) and after[name].grad is None for name, x in before.items()
    )
    found["forwards"] = all(vars(module).get("forward") is forwards[name] for name, module in model.named_modules())
    found["own"] = own_gradient(model) if kind in TRAINED else {}
    if not quick and kind == "llama":
        found["refusals"] = refusals(policy, direction, directory)
    with open(f"{directory}/{rank}.pickle", "wb") as file:
        pickle.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


CASES = [("experts", True)]
CASES += [pytest.param((kind, False), marks=pytest.mark.slow) for kind in MODELS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0] + ", quick" * case[1])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def want(case):
    return alone(*case)


@pytest.fixture(scope="module")
def results(case, tmp_path_factory):
    """What each rank got."""
    directory = tmp_path_factory.mktemp("parallel")
    return on_ranks(run_rank, WORLD, directory, directory, *case)


def test_numbers_are_those_of_the_whole_model(case, want, results):
    kind, quick = case
    allowed = {} if quick else rounding(kind, want)
    for result in results:
        off = differences(result, want)
        if off.pop("floors", None) is not None:  # of the size of rounding errors, which are others where sums are cut
            assert np.all(np.abs(np.log(result["floors"] / want["floors"])) < np.log(5))
        far = {name: x for name, x in off.items() if not x <= max(1e-12, TIMES_ROUNDING * allowed.get(name, 0.0))}
        assert far == {}


def test_every_rank_gets_the_same(results):
    first, second = ({n: x.tobytes() for n, x in result.items() if isinstance(x, np.ndarray)} for result in results)
    assert first == second and "sharded over ranks" in results[0]["shown"]


def test_weights_and_forwards_come_back_and_train_on(case, want, results):
    for result in results:
        assert result["as before"] and result["forwards"]
        assert result["own"].keys() == (want["own"].keys() if case[0] in TRAINED else set())
        for name, g in result["own"].items():
            np.testing.assert_allclose(g, want["own"][name], rtol=0, atol=3e-7 * np.abs(g).max())


def test_the_noise_floor_moves_weights_by_the_same_random_numbers(case, results):
    for result in results:
        assert case[1] or all(result["rounded"].values())


def test_a_pass_that_fails_leaves_nothing_behind(case, results):
    for result in results:
        assert case[1] or (result["failed"] == "KeyError: 'a bug'" and all(result["again"].values()))


def test_what_cannot_be_handled_is_refused_by_name(case, results):
    for rank, result in enumerate(results if case == ("llama", False) else []):
        found = result["refusals"]
        assert "model.layers.0.mlp.up_proj is tensor parallel by no plan of transformers" in found["no plan"]
        assert (
            "lm_head.weight is tensor parallel as 'colwise_gather_output' and lies as (Shard(dim=1)"
            in (found["head by columns"])
        )
        assert "lm_head.weight is on a mesh of (2, 1) ranks" in found["mesh"]
        assert "model.layers.0.mlp is tensor parallel as 'all_reduce'" in found["style"]
        assert "model.layers.0.mlp.up_proj is tensor parallel by hooks around its forward" in found["hooks"]
        assert found["compiled"] == "ValueError: compile_layers: True for sharded weights, expected False"
        assert found["drifted"] == "ValueError: policy: not the same on the 2 ranks, expected the same on each"
        assert found["rollouts"] == "ValueError: batch: not the same on the 2 ranks, expected the same on each"
        assert found["later rollouts"].startswith("ValueError: batch: the 2 ranks have different rollouts")
        assert found["nested"] == "ValueError: second_order: 'nested' for sharded weights, expected 'difference'"
        assert found["sample"].startswith("ValueError: policy: sharded weights, expected whole ones to sample from")
        assert f"do not fit into memory on rank {rank}, and with sharded weights" in found["memory"]
