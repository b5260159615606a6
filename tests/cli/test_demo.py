import json

import pytest

from dentropy.cli import main


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
        assert first["seeds"] == {"rollouts": 3, "update_rollouts": 4, "fresh_rollouts": 5}
        assert second["seeds"]["rollouts"] == 5 and first["base_entropy"] != second["base_entropy"]
        assert (first["n_sequences"], first["n_groups"]) == (192, 24)
        assert second["provenance"]["command"] == "dentropy demo --seed 5"
        assert "Files in dentropy-demo-2" in capsys.readouterr().out
        self.hangs_together(first)

    def hangs_together(self, content):
        fresh, measured = content["fresh_check"], content["measured"][-1]
        assert fresh["eta"] == measured["eta"] == 4 * content["step_size"]
        assert abs(fresh["difference"]) < 4 * fresh["difference_stderr"]
        assert fresh["delta"] == pytest.approx(fresh["value"] - content["base_entropy"])
        assert content["audit"]["warnings"] == []
