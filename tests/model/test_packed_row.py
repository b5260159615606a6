"""What a pass asks of the host is in the row; nothing is read back from the device on the way."""

import traceback

import numpy as np
import pytest
import torch
from models import random_batch, random_direction, random_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dentropy import Policy
from dentropy.model.packed_row import PackedRow
from dentropy.passes.first_rollouts import check_on_first
from dentropy.passes.forward_mode import moved_weights
from dentropy.passes.microbatches import AUTO, Microbatch, TokenBudget, walk
from dentropy.passes.reverse_mode import gradient

CPU = torch.device("cpu")
READS = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.nonzero, torch.nonzero, torch.equal}
READS |= {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
LENGTH_UNKNOWN = {Tensor.repeat_interleave, torch.repeat_interleave}
PASSES_ON = "/dentropy/model/one_sided.py"  # what the model calls
# Where a CPU's own forms stand, which may read; and a mask's size, which is on the CPU wherever the model is.
MAY_READ = ("stats/", "model/attention_ops.py", "model/attention.py")


class HostReads(TorchFunctionMode):
    """Collects the places in dentropy where values of a tensor become the host's: on a GPU it would wait there."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS or (func in LENGTH_UNKNOWN and "output_size" not in (kwargs or {})):
            frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith(PASSES_ON)]
            frames = [frame for frame in frames if "/torch/" not in frame.filename]
            place = frames[-1].filename.rpartition("/dentropy/")[2]
            if "/dentropy/" in frames[-1].filename and not place.startswith(MAY_READ):
                self.places.append(f"{place}: {frames[-1].line}")
        return func(*args, **(kwargs or {}))


def test_positions_count_every_sequence_from_0_and_bounds_are_the_hosts():
    rows, targets = np.array([1, 3]), np.array([9, 8])
    row = PackedRow.of(np.array([5, 6, 7, 4, 3, 2]), np.array([3, 1, 2]), rows, targets, CPU)
    assert row.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert row.cu_seqlens.tolist() == row.bounds == [0, 3, 4, 6] and row.cu_seqlens.dtype == torch.int32
    assert row.longest == 3 and type(row.longest) is int
    assert (row.rows.tolist(), row.targets.tolist()) == ([1, 3], [9, 8])


def test_a_microbatch_holds_what_predicts_its_responses():
    batch = random_batch()
    rollouts = np.array([4, 2, 8])
    microbatch = Microbatch.of(batch, rollouts, CPU)
    row, places = microbatch.row, iter(microbatch.places)
    everything = [token for i in range(len(batch)) for token in batch.response(i)]
    scored = iter(zip(row.rows.tolist(), row.targets.tolist(), strict=True))
    for i, (start, stop) in zip(rollouts, zip(row.bounds, row.bounds[1:]), strict=True):
        prompt, response = batch.prompt(i), batch.response(i)
        assert row.tokens[start:stop].tolist() == (prompt + response)[:-1]
        for k, token in enumerate(response):
            assert next(scored) == (start + len(prompt) - 1 + k, token)
            assert everything[next(places)] == token
    assert next(scored, None) is None and next(places, None) is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba2"])
@pytest.mark.filterwarnings("ignore:policy. packed rows do not reproduce")
def test_a_pass_reads_nothing_back(name):
    model = random_model(name)
    batch, policy, direction = random_batch(), Policy(model), random_direction(model)
    weights = np.ones(batch.n_tokens)
    policy.moving(direction)
    check_on_first(policy, batch)  # which does, once
    with HostReads() as reads, policy.ready():
        with moved_weights(policy, direction, 0.1, tangent=True), torch.no_grad():
            budget = TokenBudget(AUTO, CPU)
            stats = [x for _, x in walk(batch, budget, lambda m: policy.score(m.row, batch.temperature, tangent=True))]
        gradient(policy, batch, list(model.parameters()), weights, weights)
    assert stats and not reads.places, reads.places
