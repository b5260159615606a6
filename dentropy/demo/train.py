"""Train the demo's policy from scratch: `python -m dentropy.demo.train --out DIR`, about 6 minutes on a CPU.

The policy imitates random expressions (`task.random_expression`), is stored in bfloat16 in Hugging Face
format, and is judged as stored: loaded again, upcast to float32 and sampled at temperature 1.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dentropy.demo import task

PAD, END = "<pad>", "<eos>"
MAX_POSITIONS = 64
MAX_NEW_TOKENS = task.MAX_ANSWER + 1  # the longest answer and its end token


def build_tokenizer():
    """A transformers fast tokenizer: one token per character, a pad and an end token, no unknown token.

    A character it does not know is an error, so no prompt is changed in silence.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, END, *task.CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer, *, hidden: int, layers: int):
    """A float32 Llama, heads of size 32, tied embeddings, random weights from torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=32 * round(hidden / 12),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def training_batch(tokenizer, rows: int, rng: random.Random) -> dict[str, torch.Tensor]:
    """Model inputs, int64 [rows, MAX_POSITIONS] each: whole examples side by side, as many as fit in a row.

    `position_ids` restart at 0 with each example, by which transformers keeps attention within it; `labels`
    are -100 where nothing is to be learned: on prompts and on padding.
    """
    shape = (rows, MAX_POSITIONS)
    ids, labels = torch.full(shape, tokenizer.pad_token_id), torch.full(shape, -100)
    positions = torch.zeros(shape, dtype=torch.int64)
    prompt, answer = _example(tokenizer, rng)
    for row in range(rows):
        start = 0
        while (end := start + len(prompt) + len(answer)) <= MAX_POSITIONS:
            ids[row, start:end] = torch.tensor(prompt + answer)
            labels[row, start + len(prompt) : end] = torch.tensor(answer)
            positions[row, start:end] = torch.arange(end - start)
            start = end
            prompt, answer = _example(tokenizer, rng)
        positions[row, start:] = torch.arange(MAX_POSITIONS - start)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _example(tokenizer, rng: random.Random) -> tuple[list[int], list[int]]:
    target = rng.randint(0, task.MAX_TARGET)
    return tokenizer.encode(f"{target}="), tokenizer.encode(task.random_expression(target, rng) + END)


def train(tokenizer, *, steps: int, rows: int, hidden: int, layers: int, lr: float, seed: int):
    """Return the trained model, float32; AdamW with a short warm-up and a cosine decay to zero."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build_model(tokenizer, hidden=hidden, layers=layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    start = time.monotonic()
    for step in range(1, steps + 1):
        loss = model(**training_batch(tokenizer, rows, rng), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            elapsed = time.monotonic() - start
            left = elapsed / step * (steps - step)
            print(
                f"step {step}/{steps}  loss {loss.item():.3f} nats/token  {elapsed:.0f} s, {left:.0f} s left",
                flush=True,
            )
    return model


def sample(model, tokenizer, prompts: Sequence[str], *, seed: int) -> tuple[list[str], torch.Tensor]:
    """Answers sampled at temperature 1 from the whole vocabulary, and the entropy at each of their tokens.

    The entropies, in nats, are one float32 vector over the tokens of all answers, end tokens included.
    """
    torch.manual_seed(seed)
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    out = model.generate(
        **inputs,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    entropy = torch.distributions.Categorical(logits=torch.stack(out.logits, dim=1)).entropy()
    return tokenizer.batch_decode(tokens, skip_special_tokens=True), entropy[tokens != tokenizer.pad_token_id]


def evaluate(folder: Path, *, n: int, seed: int) -> None:
    """Print how good the stored policy is, upcast to float32: mean reward, also by length, and entropy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = task.prompts(n, seed)
    answers, entropy = sample(model, AutoTokenizer.from_pretrained(folder), prompts, seed=seed)
    rewards = torch.tensor([task.reward(prompt, answer) for prompt, answer in zip(prompts, answers)])
    lengths = torch.tensor([len(answer) for answer in answers])
    quantiles = torch.quantile(lengths.float(), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).int().tolist()
    print(f"{n} answers: mean reward {rewards.mean():.3f}, entropy {entropy.mean():.3f} nats/token")
    print(f"characters: 5/25/50/75/95% {quantiles}, longest {lengths.max()}")
    for low, high in [(0, 2), (3, 5), (6, 9), (10, 14), (15, task.MAX_ANSWER)]:
        chosen = (low <= lengths) & (lengths <= high)
        if chosen.any():
            mean = rewards[chosen].mean()
            print(f"  {low:2d} to {high:2d} characters: {chosen.sum():5d} answers, mean reward {mean:.3f}")


def save(model, tokenizer, folder: Path) -> None:
    """Write the policy in Hugging Face format, weights in bfloat16."""
    from transformers import GenerationConfig

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, store and evaluate; the defaults make the policy that is shipped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder for the policy")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {MAX_POSITIONS} tokens per step")
    parser.add_argument("--hidden", type=int, default=160, help="width, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval", type=int, default=2048, help="answers sampled at the end")
    args = parser.parse_args(arguments)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out: {args.out}, expected a new or an empty folder")
    if args.hidden % 32:
        parser.error(f"--hidden: {args.hidden}, expected a multiple of 32")
    tokenizer = build_tokenizer()
    model = train(
        tokenizer, steps=args.steps, rows=args.rows, hidden=args.hidden, layers=args.layers, lr=args.lr, seed=args.seed
    )
    save(model, tokenizer, args.out)
    evaluate(args.out, n=args.eval, seed=args.seed + 1)


if __name__ == "__main__":
    main()
