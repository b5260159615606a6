import json
import shutil

import pyarrow.parquet
import pytest
import torch
from commands import DIRECTION, STEP, completed
from models import random_model
from transformers import AutoModelForCausalLM

from dentropy import PackedBatch, Policy, PolicyLoss, measure, policy_gradient_step, update_attribution
from dentropy.cli import main
from dentropy.cli.probe import DEFAULT_STEPS
from dentropy.model.exact_pass import LENGTHS
from dentropy.passes.optimizer_state import load_state


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
        assert err.startswith("dentropy: warning: --after: ") and "vanish in bf16" in err

    def test_etas_and_step_size(self, tmp_path):
        content = self.run(tmp_path, "--direction v.safetensors --etas -1e-4 2e-4 --step-size 1e-4")
        assert [m["eta"] for m in content["measured"]] == [-1e-4, 2e-4] and content["step_size"] == 1e-4

    @pytest.mark.parametrize("optimizer", ["--optimizer sgd", "--optimizer-state {}"])
    def test_rewarded_rollouts(self, tmp_path, optimizer):
        model = random_model("llama", vocab_size=16)
        state = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        state.step()
        torch.save(state.state_dict(), tmp_path / "optimizer.pt")
        assert load_state(tmp_path).keys() == load_state(tmp_path / "optimizer.pt").keys() == {"state", "param_groups"}
        options = f"--step-size 1e-4 --update-rollouts rewarded.jsonl {optimizer.format(tmp_path)}"
        content = self.run(tmp_path, options)
        assert content["step_size"] == 1e-4 and content["source"]["update_rollouts"] == "rewarded.jsonl"
        assert [row["name"] for row in content["update_groups"]] == ["positive advantage", "negative advantage"]
        assert content["proxies"]

    def test_the_loss_of_rewarded_rollouts(self, place, tmp_path):
        """Of half of six rollouts a reward of 1: advantages of ±0.5/(std + 1e-4), and by a ratio of e^0.5 those of the
        rewarded are clipped."""
        update = "--step-size 1e-4 --etas 1e-4 --update-rollouts"
        self.run(tmp_path / "a", f"{update} rewarded.jsonl --loss-average sequence")
        plain = pyarrow.parquet.read_table(tmp_path / "a" / "run" / "update_tokens.parquet").to_pydict()
        lines = [json.loads(line) for line in (place / "rewarded.jsonl").read_text().splitlines()]
        size = 0.5 / (0.3**0.5 + 1e-4)
        rows = [(line, -(2 * line["reward"] - 1) * size / len(lines)) for line in lines]
        expected = [a / len(line["response_ids"]) for line, a in rows for _ in line["response_ids"]]
        assert plain["weight"] == pytest.approx(expected, rel=1e-9)
        logp = iter(plain["logp"])
        for line in lines:
            line["sampler_logp"] = [next(logp) - 0.5 for _ in line["response_ids"]]
        (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        clipped = "--loss-average sequence --loss-clip 0.2 0.2"
        self.run(tmp_path / "b", f"{update} {tmp_path}/old.jsonl {clipped}")
        weights = pyarrow.parquet.read_table(tmp_path / "b" / "run" / "update_tokens.parquet")["weight"].to_pylist()
        assert weights == pytest.approx([0.0 if a < 0 else a * 1.6487213 for a in expected], rel=1e-5)

    def test_a_kl_penalty_is_to_the_model_that_is_named(self, place, tmp_path):
        options = "--step-size 1e-4 --etas 1e-4 --update-rollouts rewarded.jsonl --optimizer sgd --update-groups"
        found = self.run(tmp_path, f"--loss-kl 0.5 --loss-kl-reference after {options}")
        policy, reference = (Policy.from_pretrained(place / name, device="cpu") for name in ("before", "after"))
        batch, update = (PackedBatch.from_jsonl(place / f"{name}.jsonl") for name in ("rollouts", "rewarded"))
        loss = PolicyLoss(kl=0.5, reference_logp=measure(reference, update, keep_tokens=True).tokens.logp)
        step = policy_gradient_step(policy, update, step_size=1e-4, optimizer="sgd", loss=loss)
        sums = measure(policy, batch, step.direction(), keep_tokens=True)
        entry, attributed = found["update_attribution"], update_attribution(policy, batch, step, sums)
        for name in ("total", "tokens", "kl"):
            assert entry[name] == pytest.approx(getattr(attributed, name), rel=1e-6)
        assert abs(entry["kl"]) > 100 * abs(entry["unexplained"])
        assert found["source"]["loss_kl_reference"] == "after"

    def test_text_rollouts_with_an_end_token_added(self, tmp_path):
        text = "--direction v.safetensors --rollouts text.jsonl"
        plain, ended = (self.run(tmp_path / "plain", text), self.run(tmp_path / "ended", f"{text} --append-eos"))
        assert (plain["n_tokens"], ended["n_tokens"]) == (3, 4)

    def test_text_rollouts_that_were_cut_off_get_no_end_token(self, tmp_path, capsys):
        options = "--direction v.safetensors --rollouts text.jsonl --append-eos --max-new-tokens"
        assert [self.run(tmp_path / cap, f"{options} {cap}")["n_tokens"] for cap in ("3", "4")] == [3, 4]

    def test_the_policy_says_what_ends_a_response(self, place, tmp_path, capsys):
        """The rollouts' end token is the tokenizer's, but this policy ends with others."""
        model = AutoModelForCausalLM.from_pretrained(place / "before")
        model.generation_config.eos_token_id = [3, 4]
        shutil.copytree(place / "before", tmp_path / "before")
        model.save_pretrained(tmp_path / "before")
        options = f"--policy {tmp_path}/before --direction v.safetensors"
        assert main(completed(f"probe {options} --rollouts text.jsonl --append-eos --out {tmp_path}/new")) == 2
        assert "--append-eos: responses may have ended with '1' or '2'" in capsys.readouterr().err
        ended = self.run(tmp_path / "named", f"{options} --rollouts text.jsonl --append-eos 2")
        assert ended["n_tokens"] == 4
        lines = [json.loads(line) for line in (place / "rollouts.jsonl").read_text().splitlines()]
        rows = [line | {"response_ids": [*(token for token in line["response_ids"] if token > 4), 1]} for line in lines]
        (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.run(tmp_path / "ids", f"{options} --rollouts {tmp_path}/ids.jsonl")
        assert "no response ends with one of the end tokens 3, 4" in capsys.readouterr().err

    def test_the_token_budget_holds_for_every_pass(self, tmp_path, monkeypatch):
        longest = []
        hidden = Policy.hidden

        def watched(policy, row):
            longest.append(len(row.tokens))
            return hidden(policy, row)

        monkeypatch.setattr(Policy, "hidden", watched)
        update = "--step-size 1e-4 --update-rollouts rewarded.jsonl"
        few = self.run(tmp_path / "few", f"{update} --token-budget 30")
        assert max(longest) <= 30
        many = self.run(tmp_path / "many", f"{update} --token-budget auto")
        assert max(longest) > 30
        assert few["slope"][0]["value"] == pytest.approx(many["slope"][0]["value"], rel=1e-3)

    def test_a_rollout_that_memory_has_no_room_for_is_one_line(self, place, tmp_path, monkeypatch, capsys):
        hidden = Policy.hidden

        def full(policy, row):
            if len(row.tokens) == LENGTHS.sum():  # the self-check's
                return hidden(policy, row)
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
