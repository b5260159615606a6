import numpy as np
import pytest

from dentropy import PackedBatch
from dentropy.rollouts.overlap import MOSTLY, overlap, split


def drawn(seed, *, prompts=16, per_prompt=8, length=6, vocab=40, first_prompt=0):
    """Rollouts of uniform tokens: the shorter they are and the smaller the vocabulary, the more are equal by chance."""
    rng = np.random.default_rng(seed)
    of = [first_prompt + i // per_prompt for i in range(prompts * per_prompt)]
    return PackedBatch.from_lists(
        [[3, 4 + p] for p in of], [rng.integers(0, vocab, length).tolist() for _ in of], of, rng.random(len(of))
    )


def both(a, b):
    """The rollouts of two batches as one."""
    parts = [(batch.prompt(i), batch.response(i)) for batch in (a, b) for i in range(len(batch))]
    return PackedBatch.from_lists(*zip(*parts, strict=True), [*a.group, *b.group], [*a.reward, *b.reward])


@pytest.mark.parametrize("length, vocab", [(6, 40), (2, 6), (1, 2), (1, 6)])
def test_a_copy_is_found_and_rollouts_drawn_apart_are_not(length, vocab):
    for seed in range(5):
        a, b = (drawn(2 * seed + k, length=length, vocab=vocab, prompts=64) for k in (0, 1))
        assert overlap(a, b).share == 0.0
        shuffled = a.take(np.random.default_rng(seed).permutation(len(a)).tolist())
        assert overlap(a, a).n_equal == overlap(a, shuffled).n_equal == len(a)
        if (length, vocab) != (1, 2):  # with eight draws of two tokens nearly every row has a twin
            assert overlap(a, shuffled).share > MOSTLY


def test_part_of_a_copy_is_some():
    a, b = drawn(0), drawn(1)
    mixed = both(b, a.take(range(len(a) // 4)))
    found = overlap(a, mixed)
    assert found.n_equal == len(a) // 4 and found.share == pytest.approx(0.25, abs=0.02)
    assert overlap(a, both(a, b)).share > MOSTLY


def test_the_prompt_counts_with_the_answer():
    a = drawn(0)
    assert overlap(a, drawn(0, first_prompt=20)).n_equal == 0


def test_a_split_shares_no_prompt_and_is_the_same_each_time():
    both_files = drawn(0)
    judges, makers = split(both_files, both_files)
    prompts = [{tuple(part.prompt(i)) for i in range(len(part))} for part in (judges, makers)]
    assert not prompts[0] & prompts[1] and [len(p) for p in prompts] == [8, 8]
    assert len(judges) + len(makers) == len(both_files) and overlap(judges, makers).n_equal == 0
    again = split(both_files, both_files)[1]
    assert again.tokens.tolist() == makers.tokens.tolist() and again.reward.tolist() == makers.reward.tolist()
    assert split(both_files, both_files, seed=1)[1].tokens.tolist() != makers.tokens.tolist()
    # another file: what is not among the prompts that made the update stays
    apart = drawn(1, first_prompt=100)
    assert len(split(apart, both_files)[0]) == len(apart)


def test_prompts_that_were_drawn_twice_stay_together():
    twice = both(drawn(0, prompts=4), drawn(1, prompts=4))
    judges, makers = split(twice, twice)
    assert len(judges) == len(makers) == 32


def test_a_split_that_leaves_nothing_is_refused():
    one = drawn(0, prompts=1)
    with pytest.raises(ValueError, match="split: 1 prompt to make the update from, expected at least 2"):
        split(one, one)
    two = drawn(0, prompts=2)
    made = split(two, two)[1]
    with pytest.raises(ValueError, match="split: no rollout is left to judge"):
        split(made, two)


def test_taking_rollouts_keeps_every_column():
    batch = drawn(0, prompts=2, per_prompt=2)
    part = batch.take([3, 0])
    assert [part.response(0), part.response(1)] == [batch.response(3), batch.response(0)]
    assert part.group.tolist() == [1, 0] and part.reward.tolist() == batch.reward[[3, 0]].tolist()
    assert part.advantage is None and part.temperature == batch.temperature
