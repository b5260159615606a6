"""Model folders: config.json, the index of shards, tokenizer files, the weights."""

import json
import shutil
from random import Random

import pytest
import torch
from harness import Format, run
from mangling import as_json, mangled, mangled_bytes
from models import random_model

from dentropy import Policy
from dentropy.demo.train import build_tokenizer
from dentropy.model.checkpoint import load_tokenizer

SETTINGS = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of one small model in two shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("good") / "checkpoint"
    random_model("llama", **SETTINGS, eos_token_id=1).save_pretrained(folder, max_shard_size="4KB")
    build_tokenizer().save_pretrained(folder)
    return folder


def make(good, *names):
    """A copy of the folder with one of these files mangled; the file is what errors may name, or its folder."""

    def write(folder, random: Random):
        policy = folder / "checkpoint"
        shutil.rmtree(policy, ignore_errors=True)
        shutil.copytree(good, policy)
        file = policy / random.choice(names)
        data = file.read_bytes()
        if file.suffix == ".json" and random.random() < 0.7:
            data = as_json(mangled(json.loads(data), random))
        else:
            data = mangled_bytes(data, random)
        file.write_bytes(data)
        return policy

    return write


def read(path):
    return Policy.from_pretrained(path, device="cpu")


def mangle_and_read(count, make, folder, read=read, forbidden=lambda *_: None):
    return run(Format(count, make, read, forbidden, argument="policy: "), folder)


@pytest.mark.parametrize("count", [60, pytest.param(160, marks=pytest.mark.slow)])
def test_models(good, folder, count):
    own = read(good).model.state_dict()

    def forbidden(path, policy):
        found = policy.model.state_dict()
        same = found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
        return None if same else "its weights are not those in the folder"

    names = ("config.json", "model.safetensors.index.json", "generation_config.json")
    counts = mangle_and_read(count, make(good, *names), folder, forbidden=forbidden)
    assert min(counts["read"], counts["refused"]) > count / 8


def test_weights(good, folder):
    names = sorted(path.name for path in good.glob("*.safetensors"))
    assert mangle_and_read(60, make(good, *names), folder)["refused"] > 20


def test_tokenizers(good, folder):
    files = make(good, "tokenizer.json", "tokenizer_config.json")
    counts = mangle_and_read(160, files, folder, read=lambda path: load_tokenizer(path, "policy"))
    assert min(counts["read"], counts["refused"]) > 20
