"""Small random policies of the architectures people use, and rollouts for them."""

import warnings
from importlib.metadata import version

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from dentropy import Direction, PackedBatch

VOCAB = 40
# transformers 5.17 leaves out the modules_to_save of an adapter folder and makes new weights: Policy refuses such.
SAVED_MODULES_LOAD = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24)
LLAMA_LIKE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "qwen2": ("Qwen2Config", LLAMA_LIKE | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", LLAMA_LIKE | dict(head_dim=8, tie_word_embeddings=True)),
    "mistral": ("MistralConfig", LLAMA_LIKE | dict(sliding_window=4)),
    "phi3": ("Phi3Config", LLAMA_LIKE | dict(sliding_window=4)),
    "gemma2": (
        "Gemma2Config",
        LLAMA_LIKE
        | dict(
            head_dim=8,
            sliding_window=4,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
        ),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        LLAMA_LIKE
        | dict(
            head_dim=8, sliding_window=4, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
        ),
    ),
    "gpt2": (
        "GPT2Config",
        dict(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        LLAMA_LIKE | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)),
    ),
    "olmo2": ("Olmo2Config", LLAMA_LIKE),
    "granite": ("GraniteConfig", LLAMA_LIKE | dict(logits_scaling=4.0)),
    "cohere": ("CohereConfig", LLAMA_LIKE | dict(logit_scale=0.25)),
    "starcoder2": ("Starcoder2Config", LLAMA_LIKE | dict(sliding_window=4)),
    "mixtral": ("MixtralConfig", LLAMA_LIKE | dict(num_local_experts=4)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        LLAMA_LIKE | dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    ),
    "gpt_oss": (
        "GptOssConfig",
        LLAMA_LIKE
        | dict(
            head_dim=8,
            num_local_experts=4,
            sliding_window=4,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
    ),
    "mamba2": (
        "Mamba2Config",
        dict(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=8,
            state_size=8,
            n_groups=1,
            chunk_size=8,
        ),
    ),
}

# Constants in the logits: a scale, and a scale and a softcap both (`random_model` makes what no library has).
SCALED = ["granite", "cohere", "cohere, capped"]
# mamba2 announces that it is run one sequence at a time; test_exact_pass asserts that it does.
quiet_fallback = pytest.mark.filterwarnings("ignore:policy. packed rows do not reproduce")


def random_model(name: str, seed: int = 0, **changes):
    import transformers

    if name == "cohere, capped":
        return _capped(random_model("cohere", seed, **changes), 0.5)
    config, settings = CONFIGS[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(settings | changes)))
    if name == "gpt_oss":  # sinks start at zero mean and tiny; let them matter
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model.eval()


def _capped(model, softcap: float):
    """`model` with its logits, already scaled, capped as gemma2's are."""

    class Capped(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = softcap * torch.tanh(out.logits / softcap)
            return out

    model.__class__ = Capped
    model.config.final_logit_softcapping = softcap
    return model


def with_lora(model, adapter: str = "default", seed: int = 5, **settings):
    """`model` inside PEFT with one more adapter, active, its factors random: PEFT starts one of them at zero."""
    import peft

    config = peft.LoraConfig(**dict(r=4, lora_alpha=8, target_modules="all-linear") | settings)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(adapter, config)
        model.set_adapter(adapter)
    else:
        with warnings.catch_warnings():  # of what it finds out about gpt2's transposed weights, and of tied heads
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config, adapter_name=adapter)
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name and f".{adapter}" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def random_batch(seed: int = 0, *, rollouts: int = 9, temperature: float = 1.0, reward: bool = False) -> PackedBatch:
    """Ragged rollouts, three to a prompt: among them one without a response and one of a single token."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCAB, rng.integers(1, 6)).tolist() for _ in range(-(-rollouts // 3))]
    lengths = [0, 1, *rng.integers(2, 12, rollouts)][:rollouts]
    return PackedBatch.from_lists(
        [prompts[i // 3] for i in range(rollouts)],
        [rng.integers(2, VOCAB, n).tolist() for n in lengths],
        group=[i // 3 for i in range(rollouts)],
        temperature=temperature,
        reward=rng.random(rollouts) if reward else None,
    )


def random_rows(seed: int = 0, *, rollouts: int = 10, n_temperatures: int = 1, **columns) -> PackedBatch:
    """Masked rows, two to a group: generated tokens alternate with given ones, start and end anywhere; in one row none
    is generated, in one all but the first, in one the last only, and one ends with many given ones."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 14, rollouts)
    masks = [np.arange(n) > rng.integers(0, n) - 1 if i % 2 else rng.random(n) < 0.5 for i, n in enumerate(lengths)]
    masks[0][:], masks[1][:], masks[2][:-1], masks[2][-1:], masks[3][1:2], masks[3][2:] = 0, 1, 0, 1, 1, 0
    for mask in masks:
        mask[0] = False
    return PackedBatch.from_rows(
        [rng.integers(2, VOCAB, n).tolist() for n in lengths],
        masks,
        group=np.arange(rollouts) // 2,
        temperature=rng.permutation(np.resize([0.7, 1.0, 1.4][:n_temperatures], rollouts)),
        reward=rng.random(rollouts),
        **columns,
    )


def random_direction(model, seed: int = 1, names=lambda name: True) -> Direction:
    """Every chosen parameter moves, by noise of the size of its own values."""
    generator = torch.Generator().manual_seed(seed)
    noise = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in model.named_parameters()
        if names(name)
    }
    return Direction({name: v * float(model.get_parameter(name).detach().std() + 0.1) for name, v in noise.items()})


def reference_columns(model, batch, direction) -> dict[str, list[float]]:
    """One rollout at a time, unpacked, by torch.func.jvp through the model's own eager attention and logits."""
    from torch.func import functional_call, jvp

    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal_lm.set_attn_implementation("eager")
    if getattr(causal_lm.config, "_experts_implementation", None) == "grouped_mm":
        causal_lm.set_experts_implementation("eager")
    primals = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: direction.tensors.get(name, torch.zeros_like(p)).to(p) for name, p in primals.items()}
    columns = {
        name: []
        for name in ("logp", "entropy", "dlogp", "dentropy", "entropy_dlogp", "entropy_to_go", "length_to_go", "fisher")
    }
    for i in range(len(batch)):
        ids, n = torch.tensor([batch.prompt(i) + batch.response(i)]), len(batch.response(i))

        def token_quantities(parameters):
            logits = functional_call(model, parameters, (), dict(input_ids=ids, use_cache=False)).logits[0]
            logp = torch.log_softmax(logits[len(batch.prompt(i)) - 1 : -1] / batch.temperature, -1)
            target = torch.tensor(batch.response(i), dtype=torch.int64)[:, None]
            return logp.gather(1, target)[:, 0], -(logp.exp() * logp).sum(-1), logp

        (logp, h, of_all), (dlogp, dh, score) = jvp(token_quantities, (primals,), (tangents,))
        later = [float(h[k + 1 :].sum()) for k in range(n)]
        columns["logp"].append(float(logp.sum()))
        columns["entropy"].append(float(h.sum()))
        columns["dlogp"].append(float(dlogp.sum()))
        columns["dentropy"].append(float(dh.sum()))
        columns["entropy_dlogp"].append(float((h * dlogp).sum()))
        columns["entropy_to_go"].append(sum(float(dlogp[k]) * later[k] for k in range(n)))
        columns["length_to_go"].append(sum(float(dlogp[k]) * (n - 1 - k) for k in range(n)))
        columns["fisher"].append(float((of_all.exp() * score.square()).sum()))  # E (d log p / dη)², term by term
    return columns


class InFloat64(TorchFunctionMode):
    """Models called .double() still compute norms, rotary embeddings and softmax in float32; inside this they don't."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


def relative_errors(found, expected) -> dict[str, float]:
    """The largest error of each column over its rms; both are tables or their columns."""
    found, expected = (x if isinstance(x, dict) else x.columns() for x in (found, expected))
    pairs = {name: (found[name], np.array(x)) for name, x in expected.items() if name not in ("group", "rollout")}
    return {name: np.abs(x - y).max() / np.sqrt(np.mean(np.square(y))) for name, (x, y) in pairs.items()}
