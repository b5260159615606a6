"""Small random policies of the architectures people use, and rollouts for them."""

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from dentropy import Direction, PackedBatch

VOCAB = 40
LLAMA_LIKE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1,
                  eos_token_id=2, pad_token_id=0)
CONFIGS = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "qwen2": ("Qwen2Config", LLAMA_LIKE | dict(tie_word_embeddings=True)),
    "gemma2": ("Gemma2Config", LLAMA_LIKE | dict(head_dim=8, sliding_window=4, attn_logit_softcapping=5.0,
                                                 final_logit_softcapping=3.0, query_pre_attn_scalar=8)),
    "gpt2": ("GPT2Config", dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                initializer_range=0.2, bos_token_id=1, eos_token_id=2)),
    "mixtral": ("MixtralConfig", LLAMA_LIKE | dict(num_local_experts=4)),
    "granite": ("GraniteConfig", LLAMA_LIKE | dict(logits_scaling=4.0)),
    "cohere": ("CohereConfig", LLAMA_LIKE | dict(logit_scale=0.25)),
    "gpt_oss": ("GptOssConfig", LLAMA_LIKE | dict(head_dim=8, num_local_experts=4, sliding_window=4,
                                                  rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "mamba2": ("Mamba2Config", dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8,
                                    state_size=8, n_groups=1, chunk_size=8)),
}


def random_model(name: str, seed: int = 0, **changes):
    import transformers

    config, settings = CONFIGS[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(settings | changes)))
    if name == "gpt_oss":  # sinks start at zero mean and tiny; let them matter
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model.eval()


def random_batch(seed: int = 0, *, rollouts: int = 9, temperature: float = 1.0, reward: bool = False) -> PackedBatch:
    """Ragged rollouts, three to a prompt: among them one without a response and one of a single token."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCAB, rng.integers(1, 6)).tolist() for _ in range(-(-rollouts // 3))]
    lengths = [0, 1, *rng.integers(2, 12, rollouts)][:rollouts]
    return PackedBatch.from_lists(
        [prompts[i // 3] for i in range(rollouts)], [rng.integers(2, VOCAB, n).tolist() for n in lengths],
        group=[i // 3 for i in range(rollouts)], temperature=temperature,
        reward=rng.random(rollouts) if reward else None)


def random_direction(model, seed: int = 1, names=lambda name: True) -> Direction:
    """Every chosen parameter moves, by noise of the size of its own values."""
    generator = torch.Generator().manual_seed(seed)
    return Direction({name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * float(p.detach().std() + 0.1)
                      for name, p in model.named_parameters() if names(name)})


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
