"""Rollouts laid out as each trainer writes them, column for column, from rollouts that are known.

`ROLLOUTS` are of several turns, `TURNS` of one, for formats without a mask.
"""

import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet
import torch
from letter_files import ids, letters

STEP = 7
END = 2


@dataclass(frozen=True)
class Rollout:
    """advantage, logp: of each generated token."""

    tokens: list
    generated: list
    group: int
    reward: float
    advantage: list
    logp: list

    @property
    def prompt(self):
        return self.tokens[: self.generated.index(1)]

    @property
    def response(self):
        return [token for token, flag in zip(self.tokens, self.generated, strict=True) if flag]

    def spread(self, values, elsewhere=0.0):
        """One value per token, those of generated tokens in their places."""
        left = iter(values)
        return [next(left) if flag else elsewhere for flag in self.generated]


ROLLOUTS = [
    Rollout([5, 6, 7, 8, 9, 2], [0, 0, 1, 0, 1, 1], 0, 1.0, [0.5, 0.25, -0.125], [-0.5, -1.0, -0.25]),
    Rollout([5, 6, 8, 2], [0, 0, 1, 1], 0, 0.0, [-0.5, -0.5], [-2.0, -0.125]),
    Rollout([9, 7, 7], [0, 1, 1], 1, 0.5, [0.0, 0.0], [-0.75, -3.0]),
]
TURNS = [
    Rollout([*ids("ab"), *ids("cd"), END], [0, 0, 1, 1, 1], 4, 1.0, [0.5] * 3, [-0.5, -1.0, -0.25]),
    Rollout([*ids("ab"), *ids("e"), END], [0, 0, 1, 1], 4, 0.0, [-0.5] * 2, [-2.0, -0.125]),
    Rollout([*ids("k"), *ids("f"), END], [0, 1, 1], 9, 0.5, [0.25] * 2, [-0.75, -3.0]),
]


def text(tokens):
    return letters().decode(tokens, skip_special_tokens=True)


def trl(rollouts=TURNS):
    """Of TRL 1.16, with one reward function and one column of log_extra."""
    return [
        {
            "step": STEP,
            "prompt": text(r.prompt),
            "completion": text(r.response),
            "accuracy": r.reward,
            "answer": "x",
            "advantage": r.advantage[0],
        }
        for r in rollouts
    ]


def trl_chat(rollouts=TURNS):
    return [
        row
        | {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in trl(rollouts)
    ]


def verl(rollouts=TURNS):
    """Of verl 0.10's v1 trainer, which adds uid."""
    return [
        {
            "input": text(r.prompt),
            "output": text(r.response),
            "gts": "x",
            "score": r.reward,
            "step": STEP,
            "acc": r.reward > 0.5,
            "request_id": f"r{i}",
            "uid": f"3f_{r.group}_{i}_0",
        }
        for i, r in enumerate(rollouts)
    ]


def prime_rl(rollouts=ROLLOUTS):
    return [
        {
            "step": STEP,
            "export_step": STEP,
            "env_name": "words",
            "token_ids": r.tokens,
            "loss_mask": [bool(flag) for flag in r.generated],
            "advantages": r.spread(r.advantage),
            "rewards": [r.reward] * len(r.tokens),
            "inference_logprobs": r.spread(r.logp),
            "trainer_logprobs": r.spread(r.logp),
            "entropy": r.spread(r.logp, None),
            "importance_ratio": [1.0] * len(r.tokens),
            "is_masked": r.spread([True] * len(r.logp), False),
            "is_masked_high": [False] * len(r.tokens),
            "is_masked_low": [None] * len(r.tokens),
            "rl_weights": [1.0] * len(r.tokens),
            "ce_weights": [0.0] * len(r.tokens),
            "ref_kl_weights": [0.0] * len(r.tokens),
        }
        for r in rollouts
    ]


def nemo_rl(rollouts=ROLLOUTS):
    longest = max(len(r.tokens) for r in rollouts)

    def padded(values, value=0):
        return [[*values, *[value] * (longest - len(values))]]

    return [
        {
            "content": [["user", "assistant"]],
            "rewards": [r.reward],
            "input_lengths": [len(r.tokens)],
            "token_ids": padded(r.tokens),
            "token_loss_mask": padded(r.generated),
            "sample_loss_mask": [1.0],
            "advantages": padded(r.spread(r.advantage), 9.0),
            "generation_logprobs": padded(r.spread(r.logp)),
            "prev_logprobs": padded(r.spread(r.logp)),
            "idx": i,
        }
        for i, r in enumerate(rollouts)
    ]


def open_instruct(rollouts=TURNS):
    return [
        {
            "step": STEP,
            "prompt_idx": r.group,
            "sample_idx": i,
            "prompt_tokens": r.prompt,
            "response_tokens": r.response,
            "reward": r.reward,
            "advantage": r.advantage[0],
            "finish_reason": "stop",
            "dataset": "d",
            "ground_truth": ["x"],
            "request_info": {"num_calls": 0, "tool_calleds": False},
            "logprobs": r.logp,
        }
        for i, r in enumerate(rollouts)
    ]


def areal(rollouts=TURNS):
    """Text keeps its special tokens."""
    return [
        {
            "task_id": r.group,
            "sample_idx": i,
            "seqlen": len(r.tokens),
            "prompt_len": len(r.prompt),
            "head_version": STEP,
            "tail_version": STEP,
            "reward": r.reward,
            "prompt": letters().decode(r.prompt),
            "completion": letters().decode(r.response),
        }
        for i, r in enumerate(rollouts)
    ]


def slime(rollouts=ROLLOUTS):
    samples = []
    for i, r in enumerate(rollouts):
        n = len(r.tokens) - len(r.prompt)
        samples.append(
            {
                "group_index": r.group,
                "index": i,
                "prompt": "p",
                "tokens": r.tokens,
                "response": "r",
                "response_length": n,
                "label": "x",
                "reward": r.reward,
                "loss_mask": None if all(r.generated[-n:]) else r.generated[-n:],
                "rollout_log_probs": r.spread(r.logp)[-n:],
                "weight_versions": ["3"],
                "remove_sample": False,
                "status": "completed",
                "metadata": {},
            }
        )
    return samples


def messages(rollouts=TURNS):
    return [
        {
            "messages": [
                {"role": "user", "content": text(r.prompt)},
                {"role": "assistant", "content": text(r.response)},
            ],
            "reward": r.reward,
            "group": r.group,
        }
        for r in rollouts
    ]


def as_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_array(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return path


def as_parquet(path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_saved(path, rows):
    torch.save({"rollout_id": STEP, "samples": rows}, path)
    return path
