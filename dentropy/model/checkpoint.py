"""Loading a checkpoint so that nothing in it is missing, left over or filled in, and nothing of it is run.

Weights are safetensors. Code that comes with a checkpoint is run only where `trust_remote_code` says so, and the
network is used only for a hub id: a folder is all that a folder's policy is made of.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from dentropy.doors import json_value, third_party
from dentropy.model.adapter_layers import has_adapters
from dentropy.model.adapters_in_parts import check_for_parts, shard_adapters
from dentropy.model.sharded import Stored, is_sharded, stored_tensors
from dentropy.model.shards import is_shard, own_part

# How many layers a config asks for, under the names that models give it.
LAYER_COUNTS = frozenset({"num_hidden_layers", "num_layers", "n_layers", "n_layer"})
CONFIG_FOLDER = "huggingface"  # of verl
ADAPTER_CONFIG = "adapter_config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_TIMEOUT = 5  # seconds

# What old checkpoints hold beside weights: constants that the model makes by itself.
_CONSTANT = re.compile(r"(?:^|\.)(?:masked_bias|position_ids|(?:original_)?inv_freq|(?:cos|sin)_cached)$")
_CAUSAL_MASK = re.compile(r"(?:^|\.)(?:attn|attention)\.bias$")


def is_constant(name: str, n_dims: int = 0) -> bool:
    """Whether a tensor is no weight but a constant that follows from the configuration: rotary frequencies, the causal
    mask ([1, 1, n, n], under the name of a bias), what masked positions are filled with."""
    return bool(_CONSTANT.search(name) or (n_dims == 4 and _CAUSAL_MASK.search(name)))


def load_checkpoint(source, argument: str, dtype, *, trust_remote_code: bool = False, shard: bool = False):
    """The causal language model in a folder or of a hub id, in `dtype` ("auto": as saved).

    transformers fills tensors that a checkpoint lacks with random numbers and drops those it does not know; here both
    are a ValueError naming `argument`, as is whatever cannot be loaded. With `shard` all ranks of a process group call
    this, and each reads no more than its part of the weights, which FSDP2 then holds.
    """
    from transformers import AutoModelForCausalLM

    local = is_folder(source, argument)
    further = _sharding(f"{argument}: {source}") if shard else {}
    if local and is_sharded(Path(source)):
        return _load_sharded(Path(source), argument, dtype, trust_remote_code, further)
    if local:
        _check_files(Path(source), f"{argument}: {source}")
    adapter = Path(source) / ADAPTER_CONFIG
    if shard and local and adapter.is_file():
        where = f"{argument}: {source}"
        check_for_parts(json_value(adapter.read_bytes(), f"{where}: {ADAPTER_CONFIG}"), where)
    failed = f"{argument}: {str(source)!r} could not be loaded"
    with _network(not local), third_party(failed, "a model in the form of transformers"):
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=local,
            **further,
        )
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in found[f"{kind}_keys"] if not is_constant(str(name)))
        if names:
            raise ValueError(
                f"{argument}: {source}: {len(names)} {kind} tensors ({', '.join(names[:3])}), expected exactly "
                "the model's own"
            )
    if shard and has_adapters(model):
        shard_adapters(model, f"{argument}: {source}")
    return model


def _sharding(where: str) -> dict:
    """Keyword arguments with which transformers loads each rank's part."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise ValueError(f"{where}: to be sharded in one process, expected a process group of several ranks (torchrun)")
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size())}
    except (ImportError, TypeError) as error:
        raise ValueError(f"{where}: this transformers does not load in parts, expected 5.24 or newer") from error


def _load_sharded(folder: Path, argument: str, dtype, trust_remote_code: bool, further: dict):
    """The model of a sharded checkpoint; its configuration is beside it, or in `huggingface` in it, as verl has it."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    where = f"{argument}: {folder}"
    described = next((place for place in (folder, folder / CONFIG_FOLDER) if (place / "config.json").is_file()), None)
    if described is None:
        raise ValueError(f"{where}: no config.json in it or in its {CONFIG_FOLDER}, expected the model's configuration")
    tensors = stored_tensors(folder, argument)
    config = json_value((described / "config.json").read_bytes(), f"{where}: config.json")
    _check_config(config, len(tensors), f"{where}: config.json")
    with _network(False), third_party(f"{where} could not be loaded", "a model in the form of transformers"):
        trusted = {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(described, local_files_only=True, **trusted)
        if further:
            widest = reduce(torch.promote_types, {x.dtype for x in tensors.values() if x.dtype.is_floating_point})
            model = _laid_out(config, widest if dtype == "auto" else dtype, trusted, further)
        else:
            model = AutoModelForCausalLM.from_config(config, **trusted)
        if (described / "generation_config.json").is_file():  # it may know more end tokens
            model.generation_config = GenerationConfig.from_pretrained(described, local_files_only=True)
    found = _under_own_names(where, model.state_dict(keep_vars=True), tensors)
    if further:
        _fill(where, model, found)
        return model.eval()
    read = {id(x): x.whole() for x in found.values()}
    found = {name: read[id(x)] for name, x in found.items()}
    if dtype != "auto":
        found = {name: x.to(dtype) if x.is_floating_point() else x for name, x in found.items()}
    with third_party(f"{where}: its tensors do not fit", "those of its configuration"):
        model.load_state_dict(found, assign=True)
        model.tie_weights()
    return model.eval()


def _laid_out(config, dtype, trusted: dict, further: dict):
    """The model in parts, as transformers lays it out, and with what it makes by itself; its weights are any."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, **trusted))
    said = logging.get_verbosity()
    try:
        logging.set_verbosity_error()  # all weights are missing
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="DTensor random operators")
            return kind.from_pretrained(None, config=config, state_dict={}, dtype=dtype, **further)
    finally:
        logging.set_verbosity(said)


def _fill(where: str, model, stored: dict[str, Stored]) -> None:
    """Each rank reads its part of every tensor into its part of the model's."""
    own = model.state_dict(keep_vars=True)
    for name, x in {id(own[name]): (name, x) for name, x in stored.items()}.values():
        to_fill = own[name].detach()
        if x.shape != to_fill.shape:
            raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected the model's {tuple(to_fill.shape)}")
        own_part(to_fill).copy_(x.part_as(to_fill) if is_shard(to_fill) else x.whole())


def _under_own_names(where: str, own: dict, tensors: dict) -> dict:
    """`tensors` under the model's names, in front of which a checkpoint may put what it was saved as part of; tied ones
    may be there once."""
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)] or [""]
    prefix = min(prefixes, key=len)
    found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    for name in own.keys() - found.keys():
        twin = next((other for other in own if own[other] is own[name] and other in found), None)
        if twin is not None:
            found[name] = found[twin]
    for kind, names in (("missing", own.keys() - found.keys()), ("unexpected", found.keys() - own.keys())):
        names = sorted(name for name in names if not is_constant(name))
        if names:
            raise ValueError(f"{where}: {len(names)} {kind} tensors ({', '.join(names[:3])}), expected the model's own")
    return {name: x for name, x in found.items() if name in own}


def load_tokenizer(source, argument: str, *, trust_remote_code: bool = False):
    """The tokenizer in a folder or of a hub id; ValueError naming `argument` where there is none that loads."""
    from transformers import AutoTokenizer

    local = is_folder(source, argument)
    if local and (Path(source) / CONFIG_FOLDER).is_dir():
        source = Path(source) / CONFIG_FOLDER
    failed = f"{argument}: {str(source)!r}: its tokenizer could not be loaded"
    with _network(not local), third_party(failed, "one of transformers"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, local_files_only=local)


def is_folder(source, argument: str) -> bool:
    """True for a folder of regular files; False for what can only be a hub id.

    Raises:
        ValueError: For a file, for a folder with pipes or devices in it (which may never end), and for what is neither
            a folder nor an id: the name of a missing folder is not asked for on the network.
    """
    path = Path(source)
    if path.is_dir():
        for file in path.iterdir():
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise ValueError(f"{argument}: {file} is not a regular file, expected a folder of files")
        return True
    if path.exists():
        raise ValueError(f"{argument}: {source} is not a folder, expected a model folder or a hub id")
    beside = len(path.parts) > 1 and path.parent.is_dir()
    if beside or HUB_ID.fullmatch(str(source)) is None:
        raise ValueError(f"{argument}: {source}: no such folder, expected a model folder or a hub id")
    return False


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Unless it is allowed and the hub answers, huggingface_hub is offline and takes what was fetched before.

    `local_files_only` alone does not keep it from asking, and where nothing answers it tries again for minutes.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not (allowed and _hub_answers())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    from huggingface_hub import constants

    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except HTTPError:  # an answer, if no good one
        return True
    except OSError:
        return False
    return True


def _check_files(folder: Path, where: str) -> None:
    """ValueError where transformers would unpickle, leave the folder, fetch code or build without end: see there."""
    names = sorted(path.name for path in folder.iterdir())
    _check_safe(names, where)
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        content = json_value((folder / index).read_bytes(), f"{where}: {index}")
        files = content.get("weight_map") if isinstance(content, dict) else None
        for file in files.values() if isinstance(files, dict) else [files]:
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{where}: {index}: weight_map names {file!r:.100}, expected safetensors files of this folder"
                )
    if ADAPTER_CONFIG in names and "config.json" not in names:
        _check_base(json_value((folder / ADAPTER_CONFIG).read_bytes(), f"{where}: {ADAPTER_CONFIG}"), where)
    if "config.json" in names:
        config = json_value((folder / "config.json").read_bytes(), f"{where}: config.json")
        _check_config(config, _count_tensors(folder, names, where), f"{where}: config.json")


def _check_base(adapter, where: str) -> None:
    """The model that an adapter adapts: a folder as good as its own, or a hub id that was fetched before."""
    from huggingface_hub import try_to_load_from_cache

    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    if not isinstance(base, str):
        raise ValueError(f"{where}: adapter_config.json names no base_model_name_or_path, expected its base model")
    if is_folder(base, f"{where}: base model"):
        _check_files(Path(base), f"{where}: base model {base}")
    elif not isinstance(try_to_load_from_cache(base, "config.json"), str):
        raise ValueError(
            f"{where}: base model {base} is not on this machine, expected it to be fetched before (hf download {base})"
        )


def _check_safe(names: list[str], where: str) -> None:
    """ValueError where the weights, or an adapter's, are there in pickled form alone."""
    adapter = [name for name in names if name.startswith("adapter_model.")]
    for found in (adapter, [name for name in names if name not in adapter]):
        pickled = [name for name in found if name.endswith(".bin") and "model" in name]
        if pickled and not any(name.endswith(".safetensors") for name in found):
            raise ValueError(
                f"{where}: its weights are pickled ({pickled[0]}), which can run code, expected safetensors: load it "
                "where you trust it and write it again by model.save_pretrained"
            )


def _check_config(config, n_tensors: int, where: str) -> None:
    for key, value in _entries(config):
        if key.endswith("attn_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"{where}: {key}: {value!r:.100} is code from the hub, expected what is installed")
        if key in LAYER_COUNTS and isinstance(value, (int, float)) and value > n_tensors > 0:
            raise ValueError(f"{where}: {key}: {value!r:.40}, expected at most one for each of the {n_tensors} tensors")


def _count_tensors(folder: Path, names: list[str], where: str) -> int:
    from safetensors import safe_open

    count = 0
    for name in names:
        if name.endswith(".safetensors"):
            with (
                third_party(f"{where}: {name} could not be loaded", "safetensors"),
                safe_open(folder / name, "pt") as file,
            ):
                count += len(file.keys())
    return count


def _entries(config) -> Iterator[tuple[str, object]]:
    """(key, value) of a config and of the configs inside it."""
    left = [config]  # no recursion: nesting has no limit
    while left:
        inside = left.pop()
        if isinstance(inside, dict):
            yield from inside.items()
            left += inside.values()
