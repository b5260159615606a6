"""What a pass asks of the host is in the row; nothing is read back from the device on the way."""

import numpy as np
import pytest
import torch
from host_reads import host_reads
from models import quiet_fallback, random_batch, random_direction, random_model

from dentropy import Policy
from dentropy.model.packed_row import PackedRow
from dentropy.passes.first_rollouts import check_on_first
from dentropy.passes.forward_mode import moved_weights
from dentropy.passes.microbatches import Microbatch, TokenBudget, in_rollout_order, walk
from dentropy.passes.reverse_mode import gradient

CPU = torch.device("cpu")


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
@quiet_fallback
def test_a_pass_reads_nothing_back(name):
    """Not in dentropy, not in transformers, and not in an operator."""
    model = random_model(name)
    batch, policy, direction = random_batch(), Policy(model), random_direction(model)
    weights = np.ones(batch.n_tokens)
    policy.moving(direction)
    check_on_first(policy, batch)  # which does, once
    with host_reads() as places, policy.ready():
        with moved_weights(policy, direction, 0.1, tangent=True), torch.no_grad():
            walked = walk(batch, TokenBudget(12, CPU), lambda m: policy.score(m.row, batch.temperature, tangent=True))
            stats = in_rollout_order(walked, batch.n_tokens, None)
        gradient(policy, batch, list(model.parameters()), weights, weights)
    assert stats.dlogp.any() and not places, places


def test_reads_are_seen():
    x = torch.ones(3)
    by_python = [x.tolist, x.sum().item, lambda: bool(x.any()), lambda: x.repeat_interleave(x.long())]
    by_operator = [
        lambda: x[x > 0],
        x.nonzero,
        lambda: torch.masked_select(x, x > 0),
        lambda: x.index_put_((x > 0,), x.sum()),
    ]
    for number, read in enumerate(by_python + by_operator):
        with host_reads() as places:
            read()
        assert places and "test_packed_row.py" in places[0], number
