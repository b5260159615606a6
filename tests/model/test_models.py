"""Every architecture people use, in float32, against a float64 run of one rollout at a time through its own logits."""

from pathlib import Path

import pytest
from model_table import markdown
from models import (
    CONFIGS,
    InFloat64,
    quiet_fallback,
    random_batch,
    random_direction,
    random_model,
    reference_columns,
    relative_errors,
    with_lora,
)

from dentropy import Policy, measure

MOVES = {
    "everything": lambda model: [name for name, _ in model.named_parameters()],
    "embedding": lambda model: [
        name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight
    ],
    "one layer": lambda model: [name for name, _ in model.named_parameters() if ".1." in name],
    "LoRA": lambda model: [name for name, p in model.named_parameters() if p.requires_grad],
}
# PEFT keeps off the rest of mamba's layers; with experts' weights the reference, torch.func, does not run (test_peft).
LORA = {"mamba2": dict(target_modules=["in_proj"])} | {
    name: dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]) for name in ("mixtral", "qwen3_moe")
}


pytestmark = quiet_fallback


def assert_float32_agrees_with_float64(model, names):
    """Packed, and sequence by sequence, to 1e-5 of a column's rms, or, where a random model's own rounding costs more,
    to twice what its plain run in float32 is off by."""
    assert names
    batch, direction = random_batch(temperature=0.8), random_direction(model, names=lambda name: name in names)
    runs = [measure(Policy(model), batch, direction, token_budget=budget).columns() for budget in (4096, 1)]
    with InFloat64():
        expected = reference_columns(model.double(), batch, direction)
    errors = [relative_errors(columns, expected) for columns in runs]
    bar = dict.fromkeys(expected, 1e-5)
    if max(max(of_run.values()) for of_run in errors) > 1e-5:
        plain = relative_errors(reference_columns(model.float(), batch, direction), expected)
        bar = {column: max(1e-5, 2 * plain[column]) for column in plain}
    assert all(of_run[column] <= bar[column] for of_run in errors for column in bar), (errors, bar)


# Some kinds always (every architecture is there in float64, passes/test_forward_mode), with adapters or an
# embedding that move on one each; all others, and every pair of the two, are slow.
KINDS = ("llama", "gemma2", "gpt2", "mixtral", "mamba2")
QUICK = {("llama", "embedding"), ("mixtral", "LoRA")} | {(name, "everything") for name in KINDS}
PAIRS = [
    pytest.param(name, moves, marks=[] if (name, moves) in QUICK else pytest.mark.slow, id=f"{name}-{moves}")
    for name in CONFIGS
    for moves in MOVES
]


@pytest.mark.parametrize("name, moves", PAIRS)
def test_every_column_in_float32(name, moves):
    model = random_model(name)
    if moves == "LoRA":
        model = with_lora(model, **LORA.get(name, {}))
    assert_float32_agrees_with_float64(model, MOVES[moves](model))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_tied_where_it_is_usually_not_and_untied_where_it_is(name):
    def tied(model):
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    usual = tied(random_model(name))
    model = random_model(name, tie_word_embeddings=not usual)
    assert tied(model) != usual
    assert_float32_agrees_with_float64(model, MOVES["everything"](model))


@pytest.mark.slow
def test_the_readmes_table_is_what_the_code_finds():
    assert markdown() in (Path(__file__).parents[1] / "README.md").read_text()
