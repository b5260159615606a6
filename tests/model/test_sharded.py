"""Sharded checkpoints that torch itself wrote, against the model they were written from."""

import pickle
import shutil
import types

import pytest
import torch
from models import random_direction, random_model
from sharded_files import write_distributed, write_ranks

from dentropy import Direction, Policy
from dentropy.model.sharded import sharded_tensors
from dentropy.rollouts.sampling import end_tokens


@pytest.fixture(scope="module")
def model():
    return random_model("qwen2", num_hidden_layers=1)  # tied


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """The model as torch.distributed.checkpoint saves it beside its optimizer, and as two FSDP2 ranks do."""
    place = tmp_path_factory.mktemp("sharded")
    write_distributed(model, place / "dcp")
    write_ranks(model, place / "ranks")
    return place


@pytest.mark.parametrize("form", ["dcp", "ranks"])
def test_the_policy_is_that_which_was_saved(model, written, form):
    policy = Policy.from_pretrained(written / form, device="cpu")
    assert policy.dtype == torch.float32
    for name, p in model.named_parameters():
        assert torch.equal(policy.model.get_parameter(name), p), name
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    assert end_tokens(policy) == ((2,) if form == "dcp" else (2, 7))
    row = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(policy.model(row).logits, model(row).logits)  # rotary constants too


@pytest.mark.parametrize("form", ["dcp", "ranks"])
def test_the_update_between_two_of_them(model, written, tmp_path, form):
    moved = random_model("qwen2", num_hidden_layers=1)
    direction = random_direction(moved).tensors
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_(direction[name], alpha=0.1)
    {"dcp": write_distributed, "ranks": write_ranks}[form](moved, tmp_path / "after")
    found = Direction.between(written / form, tmp_path / "after", 0.1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found.tensors[name], (moved.get_parameter(name) - p) / 0.1)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_metadata_that_would_run_code_does_not(written, tmp_path):
    folder = tmp_path / "evil"
    shutil.copytree(written / "dcp", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"after: .*\.metadata cannot be read \(it names io.open, which no"):
        sharded_tensors(folder, "after")
    assert not (tmp_path / "ran").exists()


def change(folder, **changes):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for name, value in changes.items():
        setattr(metadata, name, value(getattr(metadata, name)))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_metadata_that_leads_out_of_the_folder_is_refused(written, tmp_path):
    folder = tmp_path / "evil"
    shutil.copytree(written / "dcp", folder)

    def out(data):
        for info in data.values():
            info.relative_path = "../dcp/" + info.relative_path
        return data

    change(folder, storage_data=out)
    with pytest.raises(ValueError, match=r"it names \.\./dcp/__0_0\.distcp, outside of the folder"):
        sharded_tensors(folder, "after")


def without_dtypes(entries):
    for entry in entries.values():
        if hasattr(entry, "properties"):
            entry.properties.dtype = None
    return entries


def at_one_place(data):
    for info in data.values():
        info.offset = 0
    return data


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / ".metadata").write_bytes(b"\x80\x04"), r"\.metadata cannot be read"),
        (lambda f: (f / ".metadata").write_bytes(pickle.dumps({})), r"it holds a dict"),
        (lambda f: (f / "__0_0.distcp").unlink(), r"cannot be read"),
        (lambda f: change(f, state_dict_metadata=lambda d: {}), r"no tensors of a model"),
        (lambda f: change(f, state_dict_metadata=without_dtypes), r"its dtype is None"),
        (lambda f: change(f, storage_data=at_one_place), r"it has two parts at one place of a file"),
    ],
)
def test_damaged_ones_are_refused_in_a_line(written, tmp_path, damage, said):
    folder = tmp_path / "damaged"
    shutil.copytree(written / "dcp", folder)
    damage(folder)
    with pytest.raises(ValueError, match=f"^after: .*{said}") as error:
        sharded_tensors(folder, "after")
    assert "\n" not in str(error.value)


def test_ranks_that_are_missing_or_of_another_model_are_refused(written, tmp_path):
    folder = tmp_path / "ranks"
    shutil.copytree(written / "ranks", folder)
    torch.save({"other": torch.ones(2)}, folder / "model_world_size_2_rank_1.pt")
    with pytest.raises(ValueError, match="tensors of other names"):
        sharded_tensors(folder, "after")
    torch.save(types.SimpleNamespace(), folder / "model_world_size_2_rank_1.pt")
    with pytest.raises(ValueError, match=r"rank_1\.pt cannot be read"):
        sharded_tensors(folder, "after")
    (folder / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(ValueError, match=r"rank files \[0\] of \[2\] ranks"):
        sharded_tensors(folder, "after")


def test_a_configuration_is_needed(written, tmp_path):
    shutil.copytree(written / "ranks", tmp_path / "ranks")
    shutil.rmtree(tmp_path / "ranks" / "huggingface")
    with pytest.raises(ValueError, match=r"policy: .*no config\.json in it or in its huggingface"):
        Policy.from_pretrained(tmp_path / "ranks")
