import json

import torch
from commands import completed

from dentropy import PackedBatch
from dentropy.cli import main
from dentropy.demo.train import build_tokenizer


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
