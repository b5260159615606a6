"""`dentropy probe` in two processes, as torchrun starts them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from commands import completed
from models import SAVED_MODULES_LOAD, with_lora
from sharded_files import write_distributed
from torch.distributed.fsdp import FSDPModule

from dentropy.demo.train import build_tokenizer
from dentropy.model.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow
OPTIONS = "--direction v.safetensors --etas 1e-3 --token-budget 60 --device cpu"


def torchrun(out, options=OPTIONS, command="probe"):
    words = completed(f"{command} {options} --out {out}")
    launched = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "dentropy",
    ]
    return subprocess.Popen(
        [*launched, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_table_is_that_of_one_process_and_one_of_them_speaks(tmp_path):
    both = torchrun(tmp_path / "both")
    out, err = both.communicate(timeout=300)
    assert both.returncode == 0, err
    assert out.count("Files in") == 1
    alone = [sys.executable, "-m", "dentropy", *completed(f"probe {OPTIONS} --out {tmp_path / 'alone'}")]
    subprocess.run(alone, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    assert (tmp_path / "both/rollouts.csv").read_bytes() == (tmp_path / "alone/rollouts.csv").read_bytes()


@pytest.mark.skipif(not SAVED_MODULES_LOAD, reason="this transformers does not load in parts")
@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="what this PyTorch has is refused by name")
@pytest.mark.parametrize("update", ["--direction v.safetensors", "--after after --step-size 1e-3"])
def test_sharded_it_is_that_of_one_process_but_for_rounding(tmp_path, update):
    """Loaded in parts, the direction too; with the first of them also a policy gradient, its tokens' shares, and the
    reference of its KL penalty."""
    options = f"{update} --etas -1e-3 1e-3 --token-budget 60 --device cpu --dtype float64"
    if "direction" in update:
        options += " --update-rollouts rewarded.jsonl --loss-kl 0.1 --loss-kl-reference after"
    both = torchrun(tmp_path / "both", f"{options} --shard")
    out, err = both.communicate(timeout=300)
    assert both.returncode == 0, err
    assert out.count("Files in") == 1
    alone = [sys.executable, "-m", "dentropy", *completed(f"probe {options} --out {tmp_path / 'alone'}")]
    subprocess.run(alone, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    got, want = columns_of(tmp_path / "both"), columns_of(tmp_path / "alone")
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=0, atol=1e-11 * np.nanmax(np.abs(values)), err_msg=name)
    sharded, whole = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("both", "alone"))
    if "direction" in update:
        assert sharded["update_attribution"]["kl"] == pytest.approx(whole["update_attribution"]["kl"], rel=1e-8)


@pytest.fixture(scope="module")
def forms(place, tmp_path_factory):
    """Two adapters of the policy a step apart, and the policy after an update as a folder of DCP."""
    forms = tmp_path_factory.mktemp("forms")
    for seed, name in enumerate(("first", "second")):
        model = with_lora(load_checkpoint(place / "before", "policy", torch.float32), target_modules=["q_proj"])
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 1e-3 * torch.randn_like(parameter)
        model.save_pretrained(forms / name)
        build_tokenizer().save_pretrained(forms / name)
    write_distributed(load_checkpoint(place / "after", "policy", torch.float32), forms / "dcp")
    return forms


@pytest.mark.skipif(not SAVED_MODULES_LOAD, reason="this transformers does not load in parts")
@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="what this PyTorch has is refused by name")
@pytest.mark.parametrize("policy, after", [("first", "second"), ("", "second"), ("", "dcp")])
def test_sharded_adapters_and_training_checkpoints_too(tmp_path, forms, policy, after):
    """In float32; between two adapters also the step of rewarded rollouts, which moves the adapter alone."""
    options = f"--after {forms / after} --step-size 1e-3 --etas -1e-3 1e-3 --token-budget 60 --device cpu"
    if policy:
        options += f" --policy {forms / policy} --update-rollouts rewarded.jsonl"
    both = torchrun(tmp_path / "both", f"{options} --shard")
    _, err = both.communicate(timeout=300)
    assert both.returncode == 0, err
    alone = [sys.executable, "-m", "dentropy", *completed(f"probe {options} --out {tmp_path / 'alone'}")]
    subprocess.run(alone, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    got, want = columns_of(tmp_path / "both"), columns_of(tmp_path / "alone")
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=0, atol=1e-6 * np.nanmax(np.abs(values)), err_msg=name)


def columns_of(run):
    with open(run / "rollouts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}


def test_sharding_needs_several_processes(tmp_path):
    words = completed(f"probe {OPTIONS} --shard --out {tmp_path / 'new'}")
    refused = subprocess.run([sys.executable, "-m", "dentropy", *words], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("dentropy: --shard: in one process, expected several")


def test_what_is_refused_is_said_once(tmp_path):
    refused = torchrun(tmp_path / "new", "--direction other.safetensors --device cpu")
    _, err = refused.communicate(timeout=300)
    assert refused.returncode != 0
    assert len([line for line in err.splitlines() if line.startswith("dentropy: ")]) == 1, err
    assert not list(tmp_path.iterdir())


def test_other_commands_run_in_one_process(tmp_path):
    refused = torchrun(tmp_path / "new.jsonl", "--device cpu", "sample")
    _, err = refused.communicate(timeout=300)
    assert refused.returncode != 0 and err.count("sample: started in 2 processes, expected one") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_both_and_the_run_resumes(rank, tmp_path):
    """In the middle of the passes: once the first has kept a microbatch."""
    running, rows = torchrun(tmp_path / "run"), tmp_path / "run.unfinished/rows.sqlite-wal"
    while running.poll() is None and not (rows.exists() and rows.stat().st_size > 100_000):
        time.sleep(0.02)
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True, check=True
    )
    start = time.monotonic()
    os.kill(sorted(map(int, workers.stdout.split()))[rank], signal.SIGKILL)
    running.communicate(timeout=60)
    assert running.returncode != 0 and time.monotonic() - start < 60
    resumed = torchrun(tmp_path / "run", f"{OPTIONS} --resume")
    assert resumed.communicate(timeout=300) and resumed.returncode == 0
    again = torchrun(tmp_path / "again")
    assert again.communicate(timeout=300) and again.returncode == 0
    assert (tmp_path / "run/rollouts.csv").read_bytes() == (tmp_path / "again/rollouts.csv").read_bytes()
