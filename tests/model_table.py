"""The README's table of models, as the code finds it: `python tests/model_table.py` prints it."""

import logging
import warnings
from collections import defaultdict
from functools import partial
from unittest import mock

import numpy as np
from models import CONFIGS, random_batch, random_direction, random_model, with_lora

from dentropy import Policy, measure

MODELS = {name: partial(random_model, name) for name in CONFIGS} | {
    "LoRA (PEFT)": lambda: with_lora(random_model("llama")),
    "LoRA with modules_to_save": lambda: with_lora(random_model("llama"), modules_to_save=["lm_head", "embed_tokens"]),
    "DoRA": lambda: with_lora(random_model("llama"), use_dora=True),
    "LoRA on the head": lambda: with_lora(random_model("llama"), target_modules=["q_proj", "lm_head"]),
}
# What the step of the differences leaves out in float32, over the rms of the exact values: 1 to 8%.
CLOSE = 0.1


def packed(policy: Policy) -> str:
    return "yes" if policy.packs else "one sequence at a time"


def head(policy: Policy) -> str:
    return "split off" if policy.splits_head else "the model's own"


def by_differences(policy: Policy) -> str:
    batch, direction = random_batch(), random_direction(policy.model)
    exact = measure(policy, batch, direction, order=2, second_order="nested")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sums = measure(policy, batch, direction, order=2)
    jumps = any("jump within the step" in str(warning.message) for warning in said)
    close = all(
        np.abs(getattr(sums, column) - values).max() <= CLOSE * np.sqrt(np.mean(np.square(values)))
        for column, values in (("d2logp", exact.d2logp), ("d2entropy", exact.d2entropy))
    )
    if not close and not jumps:
        return "no"
    # Whether a random model's routing flips within the step is chance; that it can is not.
    has_experts = any(".experts." in name for name, _ in policy.model.named_parameters())
    return "yes; warns where routing flips" if has_experts else "yes"


def nested(policy: Policy) -> str:
    try:
        measure(policy, random_batch(), random_direction(policy.model), order=2, second_order="nested")
    except ValueError:
        return "no"
    return "yes"


def compiled(policy: Policy) -> str:
    """Whether layers go into a graph, and come out of it as they do uncompiled. What compiles it is torch.compile."""

    def interpreted(graph, **_settings):
        graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        graph.recompile()
        return graph

    with warnings.catch_warnings(record=True) as said, mock.patch("torch.compile", interpreted):
        warnings.simplefilter("always")
        try:
            measure(Policy(policy.model, compile_layers=True), random_batch(), random_direction(policy.model))
        except ValueError:
            return "refused"
    reasons = [str(warning.message) for warning in said if "goes on uncompiled" in str(warning.message)]
    if not reasons:
        return "yes"
    assert all("data-dependent" in reason or "number of tokens" in reason for reason in reasons), reasons
    return "no: routing depends on values" if "data-dependent" in reasons[0] else "no"


COLUMNS = {
    "packed rows": packed,
    "head": head,
    "second order by differences": by_differences,
    "nested": nested,
    "compiled layers": compiled,
}


def markdown() -> str:
    """One row for all models with the same cells."""
    rows = defaultdict(list)
    for name, make in MODELS.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="policy: ")
            policy = Policy(make())
        rows[tuple(cell(policy) for cell in COLUMNS.values())].append(name)
    lines = [("model", *COLUMNS), ("---",) * (len(COLUMNS) + 1)]
    lines += [(", ".join(names), *cells) for cells, names in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(markdown(), end="")
