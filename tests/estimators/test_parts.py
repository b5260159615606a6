"""Tables that are worked on a part at a time give what they give in one piece."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tables import one_batch, table_with_tokens

from dentropy import PackedBatch
from dentropy.estimators import by_lag, by_position, forecast, importance, slope, token_attribution
from dentropy.passes import second_order
from dentropy.stats import segments
from dentropy.stats.sequence_sums import sequence_sums

ETA = 0.05


@pytest.fixture(params=[False, True], ids=["own", "another sampler's"])
def tables(request):
    """At the base weights and moved, whose rows stand in another order; rollouts of different lengths, some of none."""
    batch = one_batch()
    base, moved = table_with_tokens(*batch), table_with_tokens(*batch, eta=ETA)
    if request.param:
        drawn = table_with_tokens(*batch, eta=-0.1)
        more = dict(sampler_logp=drawn.logp, sampler_tokens=drawn.tokens.logp.numpy())
        base, moved = replace(base, **more), replace(moved, **more)
    return base, moved.take(np.random.default_rng(0).permutation(len(moved)))


def everything(base, moved) -> dict[str, np.ndarray]:
    reward = np.arange(len(base)) % 2.0
    measured = importance(base, moved, weights="prefix")
    found = forecast(base, {ETA: moved}, reward)
    means = {"length": found.length, "reward": found.reward}
    values = {"worst": [measured.worst_position, measured.worst_ess_fraction]}
    values |= {
        "measured": measured.influence,
        "tokens": token_attribution(base),
        "horizon": slope(base, horizon=1).influence,
    }
    values |= {"causal": slope(base).influence, "kl": found.kl.measured[ETA].influence}
    values |= {f"{name} slope": mean.slope.influence for name, mean in means.items()}
    values |= {name: mean.changes[ETA].influence for name, mean in means.items()}
    for name, bins in (("position", by_position(base)), ("lag", by_lag(base))):
        values |= {name: bins.contribution, f"{name} count": bins.count, f"{name} stderr": bins.stderr}
    return values


def test_every_estimator(tables, monkeypatch):
    whole = everything(*tables)
    monkeypatch.setattr(segments, "PIECE", 7)
    for name, found in everything(*tables).items():
        scale = np.abs(whole[name]).max()
        np.testing.assert_allclose(found, whole[name], rtol=1e-11, atol=1e-12 * scale, err_msg=name)


def test_sums_and_second_differences(tables, monkeypatch):
    base, _ = tables
    ends = np.concatenate([[0], np.cumsum(base.n_tokens.astype(int))])
    sides = [
        base.tokens._replace(logp=base.tokens.logp + s, entropy=base.tokens.entropy * (1 + s)) for s in (0.1, -0.2)
    ]

    def found():
        tokens = second_order.with_second_order(base.tokens, *sides, 0.1)
        numbers = [
            second_order.bend(base.tokens, *sides, 0.1),
            second_order.difference_step(base.tokens, torch.float32),
        ]
        return sequence_sums(tokens, ends).columns(), numbers

    whole, numbers = found()
    monkeypatch.setattr(segments, "PIECE", 7)
    monkeypatch.setattr(second_order, "PIECE", 7)
    parts, again = found()
    np.testing.assert_allclose(again, numbers, rtol=1e-12)
    for name, column in parts.items():
        np.testing.assert_allclose(
            column, whole[name], rtol=1e-11, atol=1e-12 * np.abs(whole[name]).max(), err_msg=name
        )


@pytest.mark.parametrize("lengths", [[3, 0, 9, 2, 2, 2], [0, 0], [20], []])
def test_pieces_are_all_sequences_once(lengths, monkeypatch):
    monkeypatch.setattr(segments, "PIECE", 4)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    found = list(segments.pieces(ends))
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in found:
        assert part.stop - part.start <= 1 or ends[part.stop] - ends[part.start] <= 4


def test_a_batch_without_groups_numbers_equal_prompts(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    lines = ['{"prompt_ids": [5, 6], "response_ids": [7]}', '{"prompt_ids": [5], "response_ids": [6, 7]}']
    masked = '{"token_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}'
    path.write_text("\n".join([*lines, masked, lines[1]]))
    assert PackedBatch.from_jsonl(path).group.tolist() == [0, 1, 0, 1]
