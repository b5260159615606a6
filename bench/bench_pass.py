"""The whole pass, backbone, head and sums: `dentropy.measure` beside plain forwards and the classic loop.

    pytest bench/bench_pass.py --benchmark-json=run.json && python bench/report.py run.json

Qwen2-shaped models with random weights that all move: 57M parameters at 1,024 tokens in float32 on a CPU;
with a GPU 0.5B and 1.5B at 8,192 tokens in bfloat16, and 1.5B in float32. Rollouts of a case have one length,
so nothing is padded, and an eighth of it is the prompt. How providers are timed and checked: see
`interleaved`. Beside dentropy stand:

    plain forward    no gradient, SDPA attention, logits of the response tokens: what times are relative to
    backbone alone   the same without logits
    classic loop     eager attention; torch.func.jvp through the response tokens' logits and a float32
                     log-softmax, after one pass without gradient for the mean entropy and one for the
                     returns; CLASSIC_TOKENS at a time
"""

import copy
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from interleaved import Provider, compare, largest_error, name_of
from torch.func import functional_call, jvp

import dentropy

MODELS = {
    "tiny": dict(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
    ),
    "57M": dict(
        vocab_size=49152,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=2048,
    ),
    "0.5B": dict(
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
    ),
    "1.5B": dict(
        vocab_size=151936,
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
    ),
}
CASES = [("cpu", torch.float32, "57M", 1024, length) for length in (256, 1024)]
CASES += [("cuda", torch.bfloat16, name, 8192, length) for name in ("0.5B", "1.5B") for length in (512, 1024, 4096)]
CASES += [("cuda", torch.float32, "1.5B", 8192, 1024)]
CLASSIC_TOKENS = {"cpu": 1024, "cuda": 4096}
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.2}  # catches a wrong tangent, not bfloat16's own noise
KINDS = {  # of what runs, by parts of names, the first that fits
    "head": ("_linear_states", "_token_states", "_stats_kernel", "_merge_kernel"),
    "attention": ("attention", "flash", "fmha"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "gemv", "aten::mm", "aten::addmm", "aten::bmm"),
}


class Case(NamedTuple):
    model: torch.nn.Module
    policy: dentropy.Policy
    compiling: dentropy.Policy  # of the same model, its decoder layers compiled
    batch: dentropy.PackedBatch
    direction: dentropy.Direction
    tokens: torch.Tensor  # [rollouts, length + 1]; the last token is predicted, and predicts nothing
    prompt: int  # tokens of each prompt


def dentropy_pass(case, **settings):
    settings = dict(token_budget=case.tokens.numel(), keep_tokens=True) | settings
    return dentropy.measure(case.policy, case.batch, case.direction, **settings).tokens


def dentropy_compiled(case):
    return dentropy_pass(case._replace(policy=case.compiling))


def dentropy_forward(case):
    return dentropy_pass(case, order=0)


@torch.no_grad()
def backbone_alone(case):
    with attention_of(case.model, "sdpa"):
        hidden = case.model.model(input_ids=case.tokens[:, :-1], use_cache=False).last_hidden_state
        return hidden[:, case.prompt - 1 :]


@torch.no_grad()
def plain_forward(case):
    return case.model.lm_head(backbone_alone(case))


@torch.no_grad()
def classic_loop(case):
    """logp, entropy, dlogp and dentropy of the response tokens, and the slope that they are for."""
    weights = {name: p.detach() for name, p in case.model.named_parameters()}
    tangents = {name: case.direction.tensors[name] for name in weights}

    def token_values(weights, rows):
        arguments = dict(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=rows.shape[1] - case.prompt)
        logits = functional_call(case.model, weights, (), arguments).logits
        logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        return logp.gather(-1, rows[:, case.prompt :, None])[..., 0], -(logp.exp() * logp).sum(-1)

    together = max(1, CLASSIC_TOKENS[case.tokens.device.type] // case.tokens.shape[1])
    microbatches = case.tokens.split(together)
    parts, slope = [], 0.0
    with attention_of(case.model, "eager"):
        mean = torch.cat([token_values(weights, rows)[1] for rows in microbatches]).mean()
        returns = [token_values(weights, rows)[1].flip(1).cumsum(1).flip(1) for rows in microbatches]
        for rows, to_go in zip(microbatches, returns):
            values, (dlogp, dh) = jvp(lambda w: token_values(w, rows), (weights,), (tangents,))  # noqa: B023
            slope += (dh + (to_go - mean * to_go.shape[1]) * dlogp).sum()
            parts.append((*values, dlogp, dh))
    return *(torch.cat(column).flatten() for column in zip(*parts)), slope


@contextmanager
def attention_of(model, name):
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def make_case(name, n_tokens, length, device, dtype):
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(**MODELS[name], tie_word_embeddings=True, max_position_embeddings=32768)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    direction = dentropy.Direction({name: 0.01 * torch.randn_like(p) for name, p in model.named_parameters()})
    tokens = torch.randint(config.vocab_size, (n_tokens // length, length + 1), device=device)
    prompt = length // 8
    batch = dentropy.PackedBatch.from_lists(tokens[:, :prompt].tolist(), tokens[:, prompt:].tolist())
    policies = dentropy.Policy(model), dentropy.Policy(model, compile_layers=True)
    return Case(model, *policies, batch, direction, tokens, prompt)


def truth_of(case):
    """The classic loop on the first rollout in float64 (the model's norms and softmax stay float32); of bfloat16 in
    float32, which is exact beside it and takes half the memory."""
    wide = torch.float32 if case.policy.dtype == torch.bfloat16 else torch.float64
    v = {name: v.to(wide) for name, v in case.direction.tensors.items()}
    model = copy.deepcopy(case.model).to(wide)
    return classic_loop(case._replace(model=model, tokens=case.tokens[:1], direction=dentropy.Direction(v)))[:4]


def milliseconds_by_kind(call, device):
    """Where the time of a call goes, by torch.profiler; on a CPU all products are of one kind."""
    kinds = KINDS if device == "cuda" else {"matrix products": KINDS["matrix products"]}
    activity = getattr(torch.profiler.ProfilerActivity, device.upper())
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    spent = Counter()
    for event in profile.key_averages():
        fits = (kind for kind, parts in kinds.items() if any(part in event.key for part in parts))
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        spent[next(fits, "the rest")] += microseconds / 1e3
    return dict(spent)


@pytest.mark.parametrize("device, dtype, name, n_tokens, length", CASES)
def test_pass(benchmark, device, dtype, name, n_tokens, length):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    case = make_case(name, n_tokens, length, device, dtype)
    tolerance = TOLERANCE[case.policy.dtype]
    providers = {
        "dentropy": Provider(dentropy_pass, tolerance),
        "classic loop": Provider(classic_loop, tolerance),
        "dentropy, order 0": Provider(dentropy_forward, tolerance),
        "plain forward": Provider(plain_forward),
        "backbone alone": Provider(backbone_alone),
    }
    if device == "cuda":  # on a CPU products take nearly all the time, and compiling gains nothing
        providers["dentropy, compiled layers"] = Provider(dentropy_compiled, tolerance)
    truth, first = truth_of(case), length + 1 - case.prompt

    def error_of(output):
        return largest_error([x[:first].to(case.tokens.device) for x in output[:4] if x is not None], truth)

    compare(
        benchmark,
        f"Whole pass, first order, {name} Qwen2-shaped, {n_tokens // length} × {length} "
        f"tokens, {name_of(case.policy.dtype, device)}",
        providers,
        (case,),
        error_of,
        device=device,
        reference="plain forward",
        headline=length == 1024 and name != "0.5B" and (device == "cpu" or dtype == torch.bfloat16),
    )
    benchmark.extra_info["providers"]["dentropy"]["ms_by_kind"] = milliseconds_by_kind(
        lambda: dentropy_pass(case), device
    )
