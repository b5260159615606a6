"""What two CPU ranks load in parts, of every form of a checkpoint, against the same loaded whole.

All is loaded in one set of processes; the tests look at what the ranks got.
"""

import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import SAVED_MODULES_LOAD, random_batch, random_model, with_lora
from on_ranks import join, on_ranks
from sharded_files import write_distributed, write_ranks
from torch.distributed.fsdp import FSDPModule

from dentropy import Direction, Policy, measure, policy_gradient_direction, policy_gradient_step, probe
from dentropy.model import difference, in_parts
from dentropy.model.checkpoint import load_checkpoint
from dentropy.model.shards import own_part, whole

pytestmark = [
    pytest.mark.skipif(not SAVED_MODULES_LOAD, reason="this transformers does not load in parts"),
    pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="what this PyTorch has is refused by name"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process with a card cannot be forked"),
]
WORLD, STEP = 2, 1e-3
FORMS = ("plain", "dcp", "ranks")
POLICIES, QUICK_POLICIES = (*FORMS, "adapter"), ("adapter",)
# Both sides of an update: of a form each, or an adapter after its base, or after another.
UPDATES = (("plain", "plain"), ("dcp", "dcp"), ("ranks", "ranks"), ("plain", "dcp"), ("dcp", "ranks"))
UPDATES += (("plain", "adapter"), ("dcp", "adapter"), ("adapter", "adapter"))
QUICK_UPDATES = (("dcp", "ranks"), ("plain", "adapter"), ("adapter", "adapter"))
REFUSED = {
    "with a copy": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "of embeddings": {"target_modules": ["embed_tokens"]},
}


def moved(model, seed, names=lambda name: True):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if names(name):
                p += STEP * torch.randn_like(p)
    return model


def base_model():
    return random_model("qwen2", num_hidden_layers=1)  # tied, with biases


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The model in every form, before and after an update; adapters of it."""
    place = tmp_path_factory.mktemp("forms")
    for side in ("before", "after"):
        model = moved(base_model(), 2) if side == "after" else base_model()
        model.save_pretrained(place / f"plain {side}")
        write_distributed(model, place / f"dcp {side}")
        write_ranks(model, place / f"ranks {side}", world=3)
    on = {"target_modules": ["q_proj", "down_proj"], "r": 1}  # of one row some ranks have none
    for side, settings in {"before": on, "after": on, **REFUSED}.items():
        model = with_lora(load_checkpoint(place / "plain before", "policy", torch.float32), **settings)
        if side == "after":
            moved(model, 3, lambda name: "lora_" in name)
        model.save_pretrained(place / f"adapter {side}")
    update_between(place, ("adapter", "adapter")).save(place / "adapter.safetensors")
    tensors = update_between(place, ("plain", "plain")).tensors
    for dtype in (torch.bfloat16, torch.float32):
        Direction({name: v.to(dtype) for name, v in tensors.items()}, STEP).save(
            place / f"{str(dtype)[6:]}.safetensors"
        )
    return place


def update_between(place, forms, shard=False):
    before, after = forms
    # An adapter after its base: not that which stands for a base's update.
    return Direction.between(place / f"{before} before", place / f"{after} after", STEP, shard=shard)


def numbers(place, quick, shard):
    """By name, what must not depend on how a policy or an update is loaded."""
    found, batch = {}, random_batch(reward=True)
    directions = {forms: update_between(place, forms, shard) for forms in (QUICK_UPDATES if quick else UPDATES)}
    for forms, direction in directions.items():
        found |= {(forms, name): whole(v).numpy() for name, v in direction.tensors.items()}
    for form in QUICK_POLICIES if quick else POLICIES:
        policy = Policy.from_pretrained(place / f"{form} before", torch.float64, "cpu", shard=shard)
        tensors = dict(policy.model.named_parameters(remove_duplicate=False)) | dict(policy.model.named_buffers())
        found |= {(form, name): whole(x.detach()).numpy() for name, x in tensors.items()}
        sizes = np.array([(own_part(p).numel(), p.numel()) for p in policy.model.parameters()])
        found["parts", form] = sizes.sum(0)
        direction = directions[form, form]
        if form == "adapter":
            with no_room(shard):
                direction = Direction.load(place / "adapter.safetensors", policy.model if shard else None)
            if shard:
                check_kept(policy, direction, elsewhere=True)
        sums = measure(policy, batch, direction, eta=STEP, token_budget=60)
        found |= {(form, name): values for name, values in sums.columns().items()}
        step = policy_gradient_direction(policy, batch, step_size=STEP, optimizer="sgd", token_budget=60)
        found |= {(form, "step", name): whole(v).numpy() for name, v in step.tensors.items()}
    return found


@contextmanager
def no_room(shard):
    """As where a card has no room for a direction: it is kept elsewhere, here on a mesh that is not the weights'."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (in_parts, difference) if shard else ():
            patch.setattr(module, "stays_on_host", lambda *_: True)
        yield


def numbers_along(place, shard):
    """By name, what comes of directions in a narrower dtype than the weights, and of those that are kept elsewhere."""
    batch, found = random_batch(reward=True), {}
    policy = Policy.from_pretrained(place / "plain before", torch.float64, "cpu", shard=shard)
    step = policy_gradient_step(policy, batch, step_size=STEP, optimizer="sgd", token_budget=30)
    for name in ("bfloat16", "float32", "update"):
        with no_room(shard and name != "bfloat16"):
            if name == "update":
                direction = update_between(place, ("plain", "plain"), shard)
            else:
                direction = Direction.load(place / f"{name}.safetensors", policy.model if shard else None)
        if shard:
            check_kept(policy, direction, elsewhere=name != "bfloat16")
        result = probe(policy, batch, direction, [STEP], token_budget=30, update=step, groups=[])
        for eta, table in ((0, result.base), (STEP, result.changes[0].moved)):
            found |= {(name, eta, column): values for column, values in table.columns().items()}
        found[name, "parameters"] = np.array([result.parameters[key] for key in sorted(result.parameters)])
        found[name, "floor"] = np.array(result.changes[0].noise_floor)
        found[name, "tokens"], found[name, "norm"] = result.update.share, np.array(direction.norm())
    return found


def check_kept(policy, direction, elsewhere):
    for p, v in policy.moving(direction):
        assert any(v is x for x in direction.tensors.values())  # no copy of it in another dtype
        assert (v.device_mesh != p.device_mesh) == elsewhere


def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def refusals(place):
    """What each of several things is refused with."""
    found = {}
    for name in REFUSED:
        folder = place / f"adapter {name}"
        found[name] = refused(lambda folder=folder: Policy.from_pretrained(folder, device="cpu", shard=True))
    between = place / "plain before", place / "adapter DoRA"
    found["after"] = refused(lambda: Direction.between(*between, STEP, shard=True))
    model = load_checkpoint(between[0], "policy", torch.float32, shard=True)
    found["model"] = refused(lambda: Direction.between(model, place / "adapter after", STEP, shard=True))
    return found


def run_rank(rank, directory, place, quick):
    join(rank, WORLD, directory)
    found = numbers(place, quick, True)
    if not quick:
        found |= numbers_along(place, True) | {"refused": refusals(place)}
    with open(f"{directory}/{rank}.pickle", "wb") as file:
        pickle.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["quick", "all"])
def quick(request):
    return request.param


@pytest.fixture(scope="module")
def results(place, quick, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    return on_ranks(run_rank, WORLD, directory, directory, place, quick)


@pytest.fixture(scope="module")
def want(place, quick):
    return numbers(place, quick, False) | ({} if quick else numbers_along(place, False))


def test_what_ranks_load_in_parts_is_what_one_process_loads(want, results):
    for result in results:
        assert want.keys() <= result.keys()
        off = {}
        for name, values in want.items():
            if name[0] != "parts" and values.size:
                off[name] = np.abs(result[name] - values).max() / max(np.abs(values).max(), 1e-300)
        # A noise floor is of the size of rounding errors, which it is made of: what is common is its random numbers.
        assert {name: x for name, x in off.items() if not x <= (1e-4 if "floor" in name else 1e-12)} == {}
        assert all(off[name] == 0 for name in off if name[0] in UPDATES)  # read, not computed


def test_each_rank_has_its_part_alone(want, results):
    for name in (name for name in want if name[0] == "parts"):
        own, of_all = zip(*(result[name] for result in results), strict=True)
        assert sum(own) == of_all[0] == want[name][0] and max(own) < 0.55 * of_all[0]


def test_an_adapters_step_moves_the_adapter_alone(results):
    names = [name[2] for name in results[0] if name[:2] == ("adapter", "step")]
    assert len(names) == 4 and all("lora_" in name for name in names)


def test_what_cannot_be_in_parts_is_refused_by_name(quick, results):
    for found in [] if quick else [result["refused"] for result in results]:
        assert "adapter has modules_to_save ['norm'], which needs whole base weights" in found["with a copy"]
        assert "adapter has use_dora True, which needs whole base weights, expected none" in found["DoRA"]
        assert found["after"].startswith("after: ") and "adapter has use_dora True" in found["after"]
        assert "lora_embedding_A is read in another module's forward" in found["of embeddings"]
        assert found["model"].startswith("before: a model, expected the folder of it where ranks hold it in parts")


def test_a_direction_stays_in_host_memory_where_a_card_has_no_room_for_it():
    """Of the sizes on paper, of a rank of eight with 80 GB: 70 billion weights have none, on sixteen cards neither."""
    from sharded_memory import CARD_GB, CARDS, GB, LARGE, weights_of

    found = {}
    for name, (width, inner, layers, vocabulary, of_keys, everything) in LARGE.items():
        _, layer, embedding = weights_of(width, inner, layers, vocabulary, of_keys)
        for ranks in (CARDS, 16):
            own = 4 * everything / ranks
            found[name[:3].strip(), ranks] = in_parts.fits(own, 4 * max(layer, embedding), CARD_GB * GB - own)
    assert found == {("7B", 8): True, ("7B", 16): True, ("32B", 8): False, ("32B", 16): True} | {
        ("70B", 8): False,
        ("70B", 16): False,
    }
