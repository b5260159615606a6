"""Trainers of the real libraries around a tiny policy that speaks the demo's tokens, and what they must leave alone."""

import random

import numpy as np
import torch
from datasets import Dataset
from models import LLAMA_LIKE
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dentropy.demo import task
from dentropy.demo.run import load_tokenizer

SETTINGS = dict(
    max_steps=3,
    report_to=[],
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    disable_tqdm=True,
    learning_rate=1e-2,
    logging_steps=100,
)
SAMPLING = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=6, temperature=1.5, beta=0.0)
# Of the recorder, so that a step takes tenths of a second.
SMALL = dict(n_prompts=6, per_prompt=2, report_every=0)


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_LIKE | dict(vocab_size=16, eos_token_id=1, bos_token_id=None, num_hidden_layers=1))
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def answers(prompts, completions, **_):
    """A reward that differs within groups, the share of digits, and draws from every generator of training."""
    drawn = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002 the global one
    return [sum(c.isdigit() for c in text) / 6 + len(text) / 20 * (1 + drawn / 100) for text in completions]


def sampling_trainer(kind, folder, *, model=None, dataset=None, settings=None, functions=None, **more):
    """GRPO's ("grpo") or RLOO's ("rloo"), on the prompts of the demo's task."""
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    return trainer(
        tiny_model() if model is None else model,
        functions or answers,
        args=config(output_dir=str(folder), **SETTINGS | SAMPLING | (settings or {})),
        train_dataset=Dataset.from_dict({"prompt": task.prompts(16, 0)}) if dataset is None else dataset,
        processing_class=load_tokenizer(),
        **more,
    )


def plain_trainer(folder, *, model=None, settings=None, **more):
    """transformers.Trainer on texts of the task, as supervised training has them."""
    ids = torch.tensor([[5, 6, 7, 8, 1], [5, 9, 3, 4, 1], [6, 6, 2, 8, 1], [4, 3, 7, 9, 1]] * 4)
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        **SETTINGS | dict(remove_unused_columns=False) | (settings or {}),
    )
    collate = lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
    return Trainer(
        tiny_model() if model is None else model, args=arguments, train_dataset=dataset, data_collator=collate, **more
    )


def fingerprint(model, optimizer=None) -> dict:
    """Everything that measuring must leave as it was, as bytes to compare."""
    found = {f"weight {name}": as_bytes(p) for name, p in model.named_parameters()}
    found |= {f"buffer {name}": as_bytes(x) for name, x in model.named_buffers()}
    found |= {f"grad {name}": None if p.grad is None else as_bytes(p.grad) for name, p in model.named_parameters()}
    found |= {f"needs grad {name}": p.requires_grad for name, p in model.named_parameters()}
    found |= {f"training {name}": module.training for name, module in model.named_modules()}
    found["attention"] = model.config._attn_implementation
    found["generation"] = model.generation_config.to_json_string()
    found["forward"] = repr(vars(model).get("forward"))
    found["torch"], found["python"] = as_bytes(torch.get_rng_state()), random.getstate()
    found["numpy"] = repr(np.random.get_state())  # noqa: NPY002
    if optimizer is not None:
        for number, state in enumerate(optimizer.state.values()):
            found |= {f"state {number} {name}": as_bytes(torch.as_tensor(x)) for name, x in state.items()}
        found["groups"] = repr([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    return found


def as_bytes(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
