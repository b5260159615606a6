import json
import os
import signal

import torch
from commands import completed

from dentropy import PackedBatch
from dentropy.cli import main
from dentropy.demo.train import build_tokenizer
from dentropy.experiment.resumable import UnfinishedRun


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


def test_an_interrupted_draw_goes_on_to_the_same_file(tmp_path, monkeypatch, capsys):
    """Three parts of 64 rollouts; the second is the last that was kept."""
    options = "sample --per-prompt 64 --max-new-tokens 4 --out"
    assert main(completed(f"{options} {tmp_path}/undisturbed")) == 0
    words, write, kept = completed(f"{options} {tmp_path}/drawn"), UnfinishedRun.write_drawn, []

    def counted(store, part, *arguments):
        write(store, part, *arguments)
        kept.append(part)
        if kept == [0, 1]:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(UnfinishedRun, "write_drawn", counted)
    capsys.readouterr()
    assert main(words) == 130
    out, err = capsys.readouterr()
    folder = tmp_path / "drawn.unfinished"
    assert out == "" and err.count("\n") == 1
    assert f"kept in {folder}: the same command with --resume goes on" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, "undisturbed"]

    assert main(words) == 2
    assert f"--out: an unfinished run is kept in {folder}" in capsys.readouterr().err
    assert main([*words, "--resume", "--policy", "after", "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert f"--resume: the unfinished run in {folder} has another policy (" in said and "seed (0, now 1)" in said
    assert main([*words, "--resume"]) == 0
    assert kept == [0, 1, 2]
    assert (tmp_path / "drawn").read_bytes() == (tmp_path / "undisturbed").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "undisturbed"]
