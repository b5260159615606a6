"""The recorder in TRL's GRPO trainer under DistributedDataParallel, two processes as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trainers import tiny_model

from dentropy import Direction, PackedBatch, Policy, measure
from dentropy.integrations import drawn_by_ranks as module
from dentropy.integrations.drawn_by_ranks import drawn_by_ranks
from dentropy.rollouts.sampling import sample

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a run with the recorder and of one without."""
    found = {}
    for kind in ("recorded", "alone"):
        found[kind] = tmp_path_factory.mktemp(kind)
        launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        done = subprocess.run(
            [*launched, str(HERE / "ddp_run.py"), str(found[kind]), kind],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return found


@pytest.mark.slow
class TestUnderDistributedDataParallel:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_training_goes_on_as_without_it(self, rank, folders):
        with_it, without = (torch.load(folders[kind] / f"end-{rank}.pt") for kind in ("recorded", "alone"))
        assert with_it == without

    def test_all_log_the_same_numbers(self, folders):
        first, second = (json.loads((folders["recorded"] / f"log-{rank}.json").read_text()) for rank in (0, 1))
        assert first == second
        steps = [entry for entry in first if "dentropy/entropy" in entry]
        assert [entry["step"] for entry in steps] == [1, 2, 3]
        assert all("dentropy/failed" not in entry and "dentropy/reward_measured_delta" in entry for entry in steps)
        assert sum("dentropy/next_batch/measured_delta" in entry for entry in first) == 2

    def test_one_of_them_writes(self, folders):
        assert [path.name for path in (folders["recorded"] / "dentropy").iterdir()] == ["step-000002"]

    def test_the_table_is_that_of_one_process(self, folders):
        kept, other = (torch.load(folders["recorded"] / f"step-{rank}.pt") for rank in (0, 1))
        assert kept["batch"] == other["batch"]
        model = tiny_model()
        model.load_state_dict(kept["weights"], strict=False)
        batch = PackedBatch.from_lists(*zip(*kept["batch"], strict=True), group=kept["group"], temperature=1.5)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            table = measure(Policy(model), batch, Direction(kept["direction"]), order=2)
        finally:
            torch.set_num_threads(threads)
        for name, column in table.columns().items():
            assert np.array_equal(column, kept["table"][name].numpy()), name


def test_each_rank_draws_its_prompts_and_all_get_them(monkeypatch):
    policy, prompts = Policy(tiny_model()), [[5], [6, 7], [8]]
    settings = dict(max_new_tokens=3, temperature=1.0, per_prompt=2)
    alone = sample(policy, prompts, seed=3, **settings)
    one = drawn_by_ranks(policy, prompts, seed=3, **settings)
    assert [one.response(i) for i in range(6)] == [alone.response(i) for i in range(6)]

    of_rank = [sample(policy, prompts[rank::2], seed=3 + rank, **settings) for rank in (0, 1)]
    lists = [[batch.response(i) for i in range(len(batch))] for batch in of_rank]
    monkeypatch.setattr(module.ranks, "count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(module.ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(module.ranks, "exchange", lambda mine: (lists[module.ranks.rank()] == mine) and lists)
        both = drawn_by_ranks(policy, prompts, seed=3, **settings)
        assert [both.response(i) for i in range(6)] == [*lists[0][:2], *lists[1], *lists[0][2:]]
        assert [both.prompt(i) for i in range(6)] == [prompts[i // 2] for i in range(6)]
