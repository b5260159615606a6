import json

import pytest

from dentropy import measure
from dentropy.cli import main
from dentropy.demo.run import draw_rollouts, load_policy


class TestDemo:
    @pytest.fixture(autouse=True)
    def small(self, tmp_path, monkeypatch):
        """The demo itself, with fewer rollouts, in an empty folder."""
        for name, value in {"PROMPTS": 24, "UPDATE_PROMPTS": 12, "STEPS": (1.0, 4.0)}.items():
            monkeypatch.setattr(f"dentropy.demo.run.{name}", value)
        monkeypatch.chdir(tmp_path)

    def test_it_fills_a_fresh_numbered_folder_with_rollouts_of_its_seed(self, tmp_path, capsys):
        first, second = (tmp_path / f"dentropy-demo-{number}" for number in (1, 2))
        first.mkdir()
        assert main(["demo", "--seed", "5"]) == 0
        assert sorted(tmp_path.iterdir()) == [first, second] and not list(first.iterdir())
        content = json.loads((second / "results.json").read_text())
        assert content["seeds"] == {"rollouts": 5, "update_rollouts": 6, "fresh_rollouts": 7}
        assert (content["n_sequences"], content["n_groups"]) == (192, 24)
        assert content["provenance"]["command"] == "dentropy demo --seed 5"
        assert "Files in dentropy-demo-2" in capsys.readouterr().out
        policy, tokenizer = load_policy()
        drawn = measure(policy, draw_rollouts(policy, tokenizer, 24, 8, seed=5))
        assert content["base_entropy"] == pytest.approx(drawn.entropy.sum() / drawn.n_tokens.sum(), rel=1e-6)
        self.hangs_together(content)

    def hangs_together(self, content):
        fresh, measured = content["fresh_check"], content["measured"][-1]
        assert fresh["eta"] == measured["eta"] == 4 * content["step_size"]
        assert abs(fresh["difference"]) < 4 * fresh["difference_stderr"]
        assert fresh["delta"] == pytest.approx(fresh["value"] - content["base_entropy"])
        assert content["audit"]["warnings"] == []
