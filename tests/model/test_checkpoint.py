"""A checkpoint is read, not run: no code, no pickles, no network, no file outside its folder."""

import json
import os
import shutil
import socket
import sys

import huggingface_hub
import pytest
import torch
from models import random_model

from dentropy import Policy
from dentropy.demo.train import build_tokenizer
from dentropy.doors import is_refusal
from dentropy.model.checkpoint import load_checkpoint, load_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "policy"
    random_model("llama", vocab_size=16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def policy(good, tmp_path, monkeypatch):
    """A copy to spoil. The network would be noticed."""

    def noticed(*_, **__):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", noticed)
    monkeypatch.setattr(socket.socket, "connect", noticed)
    return shutil.copytree(good, tmp_path / "policy")


def edit(policy, name="config.json", **changes):
    content = json.loads((policy / name).read_text())
    (policy / name).write_text(json.dumps(content | changes))


def refused(call, *arguments, **options):
    with pytest.raises(ValueError, match=", expected ") as error:
        call(*arguments, **options)
    assert is_refusal(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def code(policy):
    """Put code into the folder that leaves a mark when it runs."""
    (policy / "own.py").write_text(
        "import sys\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'own'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
        "sys.modules['the_code_ran'] = sys\n"
    )
    edit(policy, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    edit(policy, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "own.T"]})
    yield policy
    sys.modules.pop("the_code_ran", None)


def test_code_in_the_folder_is_not_run_whatever_stdin_says(code, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "trust_remote_code" in refused(load_checkpoint, code, "policy", "auto")
    assert "trust_remote_code" in refused(load_tokenizer, code, "policy")
    assert "the_code_ran" not in sys.modules


def test_code_in_the_folder_is_run_where_it_is_trusted(code, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    load_checkpoint(code, "policy", "auto", trust_remote_code=True)
    assert "the_code_ran" in sys.modules


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_network(policy):
    for name in ("./none", "../none", "/none", "~/none", "a/b/c", f"{policy.parent}/none", "a b"):
        assert "no such folder" in refused(load_checkpoint, name, "policy", "auto")
    assert "is not a folder" in refused(load_checkpoint, policy / "config.json", "policy", "auto")


def test_a_hub_that_does_not_answer_is_not_asked_again_and_again(monkeypatch):
    def wait(seconds):
        raise AssertionError(f"tried again in {seconds} s")

    monkeypatch.setattr("time.sleep", wait)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: connections are refused
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert "nobody/nothing" in refused(load_checkpoint, "nobody/nothing", "policy", None)
        assert "nobody/nothing" in refused(load_tokenizer, "nobody/nothing", "policy")


@pytest.mark.parametrize("fetched, named", [(None, "some/where is not on this machine"), ("x", "could not be loaded")])
def test_an_adapter_asks_the_network_for_no_base(policy, monkeypatch, fetched, named):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: fetched)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None, raising=False)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    (policy / "config.json").unlink()
    (policy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/where"}))
    (policy / "model.safetensors").rename(policy / "adapter_model.safetensors")
    assert named in refused(load_checkpoint, policy, "policy", "auto")


def test_pickled_weights_are_refused_with_the_way_out(policy):
    (policy / "model.safetensors").unlink()
    torch.save({}, policy / "pytorch_model.bin")
    said = refused(load_checkpoint, policy, "policy", "auto")
    assert "pickled (pytorch_model.bin)" in said and "save_pretrained" in said
    shutil.copy(policy / "pytorch_model.bin", policy / "adapter_model.bin")
    (policy / "model.safetensors").write_bytes(b"")
    assert "pickled (adapter_model.bin)" in refused(load_checkpoint, policy, "policy", "auto")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", None, ["x"]])
def test_an_index_stays_in_its_folder(policy, file):
    shutil.copy(policy / "model.safetensors", policy.parent)
    (policy / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": file}}
    (policy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "expected safetensors files of this folder" in refused(load_checkpoint, policy, "policy", "auto")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_the_folder_is_not_waited_for(policy, name):
    (policy / name).unlink()
    os.mkfifo(policy / name)
    for load in (lambda: load_checkpoint(policy, "policy", "auto"), lambda: load_tokenizer(policy, "policy")):
        assert f"{name} is not a regular file" in refused(load)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"attn_implementation": "flash_attention_2"}, "flash"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "code from the hub"),
        ({"vocab_size": "16"}, "vocab_size"),
        ({"hidden_act": "nope"}, "nope"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"model_type": "no_such_model"}, "no_such_model"),
    ],
)
def test_configs_that_cannot_be_met_are_one_line(policy, changes, named):
    edit(policy, **changes)
    said = refused(Policy.from_pretrained, policy, device="cpu")
    assert said.startswith("policy: ") and named.lower() in said.lower()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, "\x00"])
def test_broken_files_are_one_line(policy, name, text):
    (policy / name).write_text(text)
    if name == "config.json":
        assert refused(load_checkpoint, policy, "policy", "auto").startswith("policy: ")
    else:
        assert refused(load_tokenizer, policy, "policy").startswith("policy: ")
