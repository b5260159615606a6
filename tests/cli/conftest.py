import json
import signal

import pytest
import torch
from blank_figures import blank_figures
from commands import STEP
from models import random_model
from safetensors.torch import save_file

from dentropy import Direction
from dentropy.cli import main
from dentropy.demo.train import build_tokenizer


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with all that the commands read: policies around an update, prompts, rollouts, a direction."""
    place = tmp_path_factory.mktemp("place")
    tokenizer = build_tokenizer()
    settings = {"vocab_size": len(tokenizer), "eos_token_id": 1}
    before, after, other = (random_model("llama", seed, **settings) for seed in (0, 0, 1))
    tensors = {name: p.detach() - before.state_dict()[name] for name, p in other.named_parameters()}
    with torch.no_grad():
        for name, p in after.named_parameters():
            p += STEP * tensors[name]
    for name, model in (("before", before), ("after", after)):
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    with torch.no_grad():
        before.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    before.save_pretrained(place / "broken")
    random_model("llama", vocab_size=32).save_pretrained(place / "wide")
    Direction(tensors, STEP).save(place / "v.safetensors")
    Direction({"other.weight": torch.ones(2)}).save(place / "other.safetensors")
    Direction({"lm_head.weight": torch.ones(2)}).save(place / "shape.safetensors")
    float8 = {name: v.to(torch.float8_e4m3fn) for name, v in tensors.items()}
    save_file(float8, place / "fp8.safetensors")
    (place / "prompts.jsonl").write_text('{"prompt": "17="}\n{"prompt": "3="}\n{"prompt_ids": [4, 5, 13]}\n')
    drawn = {}
    for seed, name in enumerate(("rollouts.jsonl", "others.jsonl")):
        files = f"--policy {place}/before --prompts {place}/prompts.jsonl --out {place}/{name}"
        assert main(f"sample --per-prompt 6 --max-new-tokens 8 --seed {seed} {files}".split()) == 0
        drawn[name] = [json.loads(line) for line in (place / name).read_text().splitlines()]
    lines, others = drawn.values()

    def write(name, rows):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("rewarded.jsonl", [line | {"reward": i % 2} for i, line in enumerate(others)])
    write("outside.jsonl", [*lines, lines[0] | {"response_ids": [3, 99]}])
    write("empty_responses.jsonl", [line | {"response_ids": []} for line in lines])
    write("text.jsonl", [{"prompt": "17=", "completion": "9+8"}])
    (place / "broken.jsonl").write_text((place / "rollouts.jsonl").read_text().replace("\n", "\n{oops\n", 1))
    (place / "empty.jsonl").write_text("")
    (place / "full").mkdir()
    (place / "full" / "notes.txt").write_text("mine")
    (place / "old_run").mkdir()
    (place / "old_run" / "results.json").write_text('{"schema_version": 99}')
    return place


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Nothing here looks at figures; the test of the command in a process of its own has the real ones."""
    blank_figures(monkeypatch)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
