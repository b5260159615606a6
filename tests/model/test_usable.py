"""What passes for a model and is not: each is refused by what its parameters are, with what to do instead."""

import socket

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import random_model
from torch import nn

from dentropy import Policy


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


class Delegates(Wrapper):
    """Answers for the model inside, as FSDP does."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrapper", [Wrapper, Delegates])
def test_wrappers_name_what_is_inside(wrapper):
    with pytest.raises(ValueError, match=f"model: wrapped in {wrapper.__name__}, .*pass model.module"):
        Policy(wrapper(random_model("llama")))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "llama", None])
def test_what_is_no_language_model_is_refused(model):
    with pytest.raises(ValueError, match="expected a causal language model"):
        Policy(model)


def test_quantized_weights_are_refused():
    model = random_model("llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantiz"):
        Policy(model)


def test_accelerates_mixed_precision_is_named():
    AcceleratorState._reset_state(reset_partial_state=True)  # one for the process, which a trainer may have made
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(random_model("llama"))
    with pytest.raises(ValueError, match="accelerate's mixed precision.*, expected the model's own: .*unwrap_model"):
        Policy(model)
    Policy(accelerator.unwrap_model(model, keep_fp32_wrapper=False))


@pytest.fixture
def one_process():
    import torch.distributed as dist

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestFullySharded:
    def test_flat_parameters_are_refused(self, one_process):
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(random_model("llama"), device_id=torch.device("cpu"))
        for wrapped in (model, model.module):
            with pytest.raises(ValueError, match="model: (merged weights|weights that are not there) .*FSDP"):
                Policy(wrapped)

    def test_original_parameters_that_its_forward_replaces_are_refused(self, one_process):
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(random_model("llama"), device_id=torch.device("cpu"), use_orig_params=True)
        with pytest.raises(ValueError, match="wrapped in FullyShardedDataParallel|FSDP|around autograd"):
            Policy(model)


def test_flat_weights_without_any_wrapper_are_refused():
    """What is left in the layers where a wrapper merged their parameters."""
    model = random_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.weight
    del layer.weight
    flat = nn.Parameter(torch.cat([weight.detach().flatten(), torch.zeros(3)]))
    layer.register_parameter("flat", flat)
    layer.weight = flat.data[:-3].view(weight.shape)
    with pytest.raises(ValueError, match="merged weights .model.layers.0.mlp.up_proj.weight is a view of"):
        Policy(model)


def test_partitions_of_zero3_are_refused():
    model = random_model("llama")
    for p in model.parameters():
        p.ds_shape, p.ds_tensor, p.data = p.shape, p.detach().flatten().clone(), torch.empty(0)
    with pytest.raises(ValueError, match=r"model: weights that are not there .*embed_tokens.* shape \(0,\).*ZeRO-3"):
        Policy(model)


def test_storages_that_were_freed_are_refused():
    model = random_model("llama")
    model.model.layers[1].mlp.up_proj.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weights that are not there .model.layers.1.mlp.up_proj.weight .* 0 bytes"):
        Policy(model)


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = random_model("llama")
    with pytest.raises(ValueError, match="model: weights that are not there .* on the meta device.*offloading"):
        Policy(model)


COMPILED = {
    "the model": torch.compile,
    "the model in place": lambda model: model.compile() or model,
    "a layer": lambda model: model.model.layers.__setitem__(1, torch.compile(model.model.layers[1])) or model,
    "a layer in place": lambda model: model.model.layers[1].compile() or model,
}


@pytest.mark.parametrize("what", COMPILED)
def test_compiled_modules_are_refused(what):
    with pytest.raises(ValueError, match="is compiled, .* expected the model as it was before torch.compile"):
        Policy(COMPILED[what](random_model("llama")))


def test_tensors_of_other_kinds_are_refused():
    class Packed(torch.Tensor):
        pass

    model = random_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed))
    with pytest.raises(ValueError, match="lm_head.weight is a Packed, expected plain tensors"):
        Policy(model)


def test_memory_that_runs_out_in_the_self_check_is_said_in_one_line(monkeypatch):
    def short(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Policy, "hidden", short)
    with pytest.raises(MemoryError, match="policy: a few tokens do not fit .*Tried to allocate 2.00 GiB.[)]$"):
        Policy(random_model("llama"))
