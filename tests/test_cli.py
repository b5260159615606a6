import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from models import random_model
from transformers import AutoModelForCausalLM

from dentropy import Direction, PackedBatch, Policy, __version__
from dentropy.cli import DEFAULT_STEPS, main
from dentropy.demo.train import build_tokenizer
from dentropy.experiment.progress import rollout_bar, token_bar

STEP = 1e-3


@pytest.fixture(scope="module")
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
    Direction(tensors, STEP).save(place / "v.safetensors")
    Direction({"other.weight": torch.ones(2)}).save(place / "other.safetensors")
    Direction({"lm_head.weight": torch.ones(2)}).save(place / "shape.safetensors")
    (place / "prompts.jsonl").write_text('{"prompt": "17="}\n{"prompt": "3="}\n{"prompt_ids": [4, 5, 13]}\n')
    files = f"--policy {place}/before --prompts {place}/prompts.jsonl --out {place}/rollouts.jsonl"
    assert main(f"sample --per-prompt 6 --max-new-tokens 8 {files}".split()) == 0
    lines = [json.loads(line) for line in (place / "rollouts.jsonl").read_text().splitlines()]

    def write(name, rows):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("rewarded.jsonl", [line | {"reward": i % 2} for i, line in enumerate(lines)])
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


class TestSample:
    def test_the_file_holds_ids_text_group_and_temperature(self, place):
        batch = PackedBatch.from_jsonl(place / "rollouts.jsonl")
        assert (len(batch), batch.n_groups, batch.temperature, batch.reward) == (18, 3, 1.0, None)
        line = json.loads((place / "rollouts.jsonl").read_text().splitlines()[0])
        tokenizer = build_tokenizer()
        assert line["prompt"] == "17=" and line["prompt_ids"] == tokenizer.encode("17=")
        assert tokenizer.encode(line["response"]) == line["response_ids"]

    def test_the_temperature_is_kept_and_the_seed_matters(self, tmp_path, capsys):
        for seed in (0, 1):
            options = f"--per-prompt 4 --max-new-tokens 8 --temperature 0.7 --seed {seed} --out {tmp_path}/{seed}"
            assert main(completed(f"sample {options}")) == 0
        first, second = (PackedBatch.from_jsonl(tmp_path / name) for name in "01")
        assert first.temperature == 0.7 and not torch.equal(first.tokens, second.tokens)
        assert "12 rollouts of 3 prompts" in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]

    def test_by_default_responses_go_as_far_as_the_positions(self, place, tmp_path):
        """512 new tokens are more than this policy has positions for."""
        (tmp_path / "prompts.jsonl").write_text('{"prompt_ids": [4, 5, 13]}\n{"prompt_ids": [4]}\n')
        files = f"--prompts {tmp_path}/prompts.jsonl --out {tmp_path}/drawn --per-prompt 40"
        assert main(completed(f"sample {files}")) == 0
        assert PackedBatch.from_jsonl(tmp_path / "drawn").response_lens.max() == 64 - 3

    def test_a_prompt_that_fills_the_positions_is_refused(self, tmp_path, capsys):
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt_ids": [4] * 64}) + "\n")
        assert main(completed(f"sample --prompts {tmp_path}/prompts.jsonl --out {tmp_path}/drawn")) == 2
        assert "after a prompt of 64 tokens" in capsys.readouterr().err


class TestProbe:
    def run(self, tmp_path, options):
        assert main(completed(f"probe {options} --out {tmp_path}/run")) == 0
        return json.loads((tmp_path / "run" / "results.json").read_text())

    def test_a_direction_and_the_update_it_stands_for_are_one(self, tmp_path):
        along = self.run(tmp_path / "a", "--direction v.safetensors")
        between = self.run(tmp_path / "b", f"--after after --step-size {STEP}")
        assert along["step_size"] == between["step_size"] == STEP
        assert [m["eta"] for m in along["measured"]] == [step * STEP for step in DEFAULT_STEPS]
        assert along["slope"][0]["value"] == pytest.approx(between["slope"][0]["value"], rel=1e-3)
        assert along["source"] == {"policy": "before", "rollouts": "rollouts.jsonl", "direction": "v.safetensors"}

    def test_an_update_that_bf16_swallowed_is_warned_of(self, place, tmp_path, capsys):
        for name in ("before", "after"):
            AutoModelForCausalLM.from_pretrained(place / name).bfloat16().save_pretrained(tmp_path / name)
        self.run(tmp_path, f"--policy {tmp_path}/before --after {tmp_path}/after --step-size {STEP}")
        err = capsys.readouterr().err
        assert err.startswith("dentropy: warning: after: ") and "vanish in bf16" in err

    def test_etas_and_step_size(self, tmp_path):
        content = self.run(tmp_path, "--direction v.safetensors --etas -1e-4 2e-4 --step-size 1e-4")
        assert [m["eta"] for m in content["measured"]] == [-1e-4, 2e-4] and content["step_size"] == 1e-4

    @pytest.mark.parametrize("optimizer", ["", "--optimizer sgd", "--optimizer-state {}/state.pt"])
    def test_rewarded_rollouts(self, tmp_path, optimizer):
        model = random_model("llama", vocab_size=16)
        state = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        state.step()
        torch.save(state.state_dict(), tmp_path / "state.pt")
        options = f"--step-size 1e-4 --update-rollouts rewarded.jsonl {optimizer.format(tmp_path)}"
        content = self.run(tmp_path, options)
        assert content["step_size"] == 1e-4 and content["source"]["update_rollouts"] == "rewarded.jsonl"

    def test_text_rollouts_with_an_end_token_added(self, tmp_path):
        text = "--direction v.safetensors --rollouts text.jsonl"
        plain, ended = (self.run(tmp_path / "plain", text), self.run(tmp_path / "ended", f"{text} --append-eos"))
        assert (plain["n_tokens"], ended["n_tokens"]) == (3, 4)

    def test_the_token_budget_holds_for_every_pass(self, tmp_path, monkeypatch):
        longest = []
        hidden = Policy.hidden

        def watched(policy, tokens, cu_seqlens):
            longest.append(len(tokens))
            return hidden(policy, tokens, cu_seqlens)

        monkeypatch.setattr(Policy, "hidden", watched)
        update = "--step-size 1e-4 --update-rollouts rewarded.jsonl"
        few = self.run(tmp_path / "few", f"{update} --token-budget 30")
        assert max(longest) <= 30
        many = self.run(tmp_path / "many", f"{update} --token-budget auto")
        assert max(longest) > 30
        assert few["slope"][0]["value"] == pytest.approx(many["slope"][0]["value"], rel=1e-3)

    def test_a_rollout_that_memory_has_no_room_for_is_one_line(self, place, tmp_path, monkeypatch, capsys):
        def full(policy, tokens, cu_seqlens):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

        monkeypatch.setattr(Policy, "hidden", full)
        assert main(completed(f"{DIRECTION} --out {tmp_path}/run")) == 2
        err = capsys.readouterr().err
        assert "do not fit into memory even alone" in err and "9 GiB" in err and err.count("\n") == 1

    def test_dtype(self, tmp_path):
        assert self.run(tmp_path, "--direction v.safetensors --dtype float64")["dtype"] == "float64"

    def test_show_prints_what_probe_printed(self, tmp_path, capsys):
        self.run(tmp_path, "--direction v.safetensors")
        printed = capsys.readouterr().out
        assert main(["show", str(tmp_path / "run")]) == 0
        shown = capsys.readouterr().out
        assert printed.startswith(shown.rstrip("\n")) and "measured ± SE" in shown
        assert f"Files in {tmp_path / 'run'}: contributions.png" in printed


class TestDemo:
    @pytest.fixture(autouse=True)
    def small(self, tmp_path, monkeypatch):
        """The demo itself, with fewer rollouts, in an empty folder."""
        for name, value in {"PROMPTS": 24, "UPDATE_PROMPTS": 12, "STEPS": (1.0, 4.0)}.items():
            monkeypatch.setattr(f"dentropy.demo.run.{name}", value)
        monkeypatch.chdir(tmp_path)

    def test_it_fills_a_fresh_numbered_folder_each_time(self, tmp_path, capsys):
        assert main(["demo"]) == 0 and main(["demo", "--seed", "5"]) == 0
        runs = [tmp_path / f"dentropy-demo-{number}" for number in (1, 2)]
        assert sorted(tmp_path.iterdir()) == runs
        first, second = (json.loads((run / "results.json").read_text()) for run in runs)
        assert first["seeds"] == {"rollouts": 0, "update_rollouts": 1, "fresh_rollouts": 2}
        assert second["seeds"]["rollouts"] == 5 and first["base_entropy"] != second["base_entropy"]
        assert (first["n_sequences"], first["n_groups"]) == (192, 24)
        assert "Files in dentropy-demo-2" in capsys.readouterr().out

    def test_a_folder_taken_meanwhile_loses_nothing(self, tmp_path, monkeypatch):
        from dentropy.demo import run

        def slowly(seed, run=run.run):
            result = run(seed)
            (tmp_path / "dentropy-demo-1").mkdir()
            return result

        monkeypatch.setattr(run, "run", slowly)
        assert main(["demo"]) == 0
        assert (tmp_path / "dentropy-demo-2" / "results.json").exists()

    def test_its_numbers_hang_together(self, tmp_path):
        assert main(["demo", "--out", "here"]) == 0
        content = json.loads((tmp_path / "here" / "results.json").read_text())
        fresh, measured = content["fresh_check"], content["measured"][-1]
        assert fresh["eta"] == measured["eta"] == 4 * content["step_size"]
        assert abs(fresh["difference"]) < 4 * fresh["difference_stderr"]
        assert fresh["delta"] == pytest.approx(fresh["value"] - content["base_entropy"])
        assert content["audit"]["warnings"] == []


def test_a_missing_package_is_named_before_any_work(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(completed(DIRECTION)) == 2
    out, err = capsys.readouterr()
    assert out == "" and "matplotlib" in err and "pip install 'dentropy[probe]'" in err and err.count("\n") == 1


# What a command gets where the case does not say otherwise. All paths are relative to `place`.
DEFAULTS = {
    "probe": {"--policy": "before", "--rollouts": "rollouts.jsonl", "--out": "new"},
    "sample": {"--policy": "before", "--prompts": "prompts.jsonl", "--out": "new"},
}
DIRECTION = "probe --direction v.safetensors"
UPDATE = "probe --step-size 1 --update-rollouts"
BAD = {
    "no command": ("", "required"),
    "unknown command": ("prob", "invalid choice"),
    "unknown option": ("show old_run --loud", "unrecognized arguments: --loud"),
    "no rollouts file": (f"{DIRECTION} --rollouts none.jsonl", "none.jsonl: no such file"),
    "no policy": (f"{DIRECTION} --policy ./none", "none"),
    "no updated policy": ("probe --step-size 1 --after none", "after:"),
    "no direction": ("probe --direction none", "none: no such file"),
    "not a direction": ("probe --direction rollouts.jsonl", "not a safetensors file"),
    "no update rollouts": (f"{UPDATE} none", "none: no such file"),
    "no optimizer state": (f"{UPDATE} rewarded.jsonl --optimizer-state none", "none"),
    "not an optimizer state": (f"{UPDATE} rewarded.jsonl --optimizer-state prompts.jsonl", "--optimizer-state"),
    "broken JSON": (f"{DIRECTION} --rollouts broken.jsonl", "line 2: broken JSON"),
    "token outside the vocabulary": (f"{DIRECTION} --rollouts outside.jsonl", "token id 99 is outside the vocab"),
    "no rollouts in the file": (f"{DIRECTION} --rollouts empty.jsonl", "no rollouts"),
    "empty responses": (f"{DIRECTION} --rollouts empty_responses.jsonl", "all are empty"),
    "no rewards": (f"{UPDATE} rollouts.jsonl", "no rewards"),
    "direction of another model": ("probe --direction other.safetensors", "other.weight"),
    "direction of another shape": ("probe --direction shape.safetensors", "lm_head.weight has shape (2,)"),
    "NaN weights": (f"{DIRECTION} --policy broken", "up_proj.weight"),
    "NaN weights after": ("probe --step-size 1 --after broken", "not finite"),
    "same weights after": ("probe --step-size 1 --after before", "equal to before"),
    "η = 0 only": (f"{DIRECTION} --etas 0", "η = 0 only"),
    "η twice": (f"{DIRECTION} --etas 1e-3 1e-3", "given 2 times"),
    "η without bounds": (f"{DIRECTION} --etas -inf", "expected finite numbers"),
    "η that is no number": (f"{DIRECTION} --etas x", "invalid float value"),
    "no step size": ("probe --after after", "--step-size"),
    "negative step size": (f"{DIRECTION} --step-size -1e-6", "step_size: -1e-06, expected a positive number"),
    "two updates": (f"{DIRECTION} --after after", "not allowed with"),
    "no update": ("probe", "one of the arguments"),
    "optimizer without update rollouts": (f"{DIRECTION} --optimizer sgd", "only with --update-rollouts"),
    "token budget in words": (f"{DIRECTION} --token-budget lots", "--token-budget: 'lots', expected auto or a whole"),
    "token budget of none": (f"{DIRECTION} --token-budget 0", "--token-budget: '0', expected auto or a whole"),
    "negative token budget": (f"{DIRECTION} --token-budget -5", "--token-budget: '-5', expected auto or a whole"),
    "rollouts are a folder": (f"{DIRECTION} --rollouts full", "full: is a folder, expected a file"),
    "dtype": (f"{DIRECTION} --dtype int8", "invalid choice"),
    "device": (f"{DIRECTION} --device toaster", "'toaster' is not a device"),
    "probe: folder with something in it": (f"{DIRECTION} --out full", "exists and is not empty"),
    "probe: out is a file": (f"{DIRECTION} --out prompts.jsonl", "exists and is not a folder"),
    "demo: folder with something in it": ("demo --out full", "exists and is not empty"),
    "top-p": ("sample --top-p 0.9", "another distribution"),
    "top-k": ("sample --top-k 50", "another distribution"),
    "temperature": ("sample --temperature 0", "temperature: expected a positive number"),
    "per-prompt": ("sample --per-prompt 0", "per_prompt: 0, expected at least 1"),
    "too many tokens": ("sample --max-new-tokens 1000", "64 positions"),
    "no prompts file": ("sample --prompts none.jsonl", "none.jsonl: no such file"),
    "no prompts in the file": ("sample --prompts empty.jsonl", "no prompts"),
    "file is there": ("sample --out rollouts.jsonl", "exists, expected a new file"),
    "no folder for the file": ("sample --out nowhere/new.jsonl", "is not a folder that can be written"),
    "not a run": ("show full", "not a run folder"),
    "no such run": ("show none", "not a run folder"),
    "a run of another version": ("show old_run", "schema_version is 99"),
}


def completed(text):
    words = text.split()
    defaults = DEFAULTS.get(words[0] if words else None, {})
    return [*words, *(part for pair in defaults.items() if pair[0] not in words for part in pair)]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, place, capsys):
    text, message = BAD[case]
    there = sorted(place.rglob("*"))
    assert main(completed(text)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dentropy: ") and err.count("\n") == 1 and message in err
    assert sorted(place.rglob("*")) == there


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["probe", "--help"], ["sample", "--help"]):
        with pytest.raises(SystemExit) as leave:
            main(arguments)
        assert leave.value.code == 0
    assert capsys.readouterr().out.startswith(f"dentropy {__version__}\nusage: dentropy ")


def test_the_command_itself_in_a_process_of_its_own(tmp_path):
    """One good and one bad run: warnings, progress and errors of libraries would show here."""
    command = [sys.executable, "-c", "import sys; from dentropy.cli import main; sys.exit(main())"]

    def run(text):
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run([*command, *completed(text)], capture_output=True, text=True, env=environment)

    bad = run(f"{DIRECTION} --policy broken")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    good = run(f"{DIRECTION} --out {tmp_path}/run")
    assert good.returncode == 0 and "warning" not in good.stderr.lower()
    assert (tmp_path / "run" / "results.json").exists() and "Files in" in good.stdout


def test_progress_shows_the_rate_and_the_time_left(capsys):
    for bar, step in ((token_bar("passes", 1000), (100,)), (rollout_bar("sampling", 10), (1, 100))):
        with bar as progress:
            for _ in range(5):
                time.sleep(0.11)
                progress(*step)
        shown = capsys.readouterr().err.split("\r")[-3]
        assert re.search(r"50%.* tokens/s", shown) and "<00:0" in shown, shown
    with token_bar("passes", 1000):
        pass
    assert capsys.readouterr().err == ""


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from dentropy.cli import _parser; _parser();"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'matplotlib', 'triton')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
