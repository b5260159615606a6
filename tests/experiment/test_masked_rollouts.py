"""A probe of rollouts of several turns, at several temperatures."""

import json

import numpy as np
import pytest
from models import random_direction, random_model, random_rows

from dentropy import Policy
from dentropy.estimators import token_attribution
from dentropy.experiment.probe import probe
from dentropy.experiment.rollout_rows import largest

STEP = 1e-3


@pytest.fixture(scope="module")
def result():
    model = random_model("llama")
    return probe(Policy(model), random_rows(n_temperatures=2), random_direction(model), [STEP, -STEP])


def test_the_report_says_the_temperatures_and_counts_generated_tokens(result, tmp_path):
    out = result.save(tmp_path / "run")
    content = json.loads((out / "results.json").read_text())
    assert content["temperature"] == [0.7, 1.0] and "temperature 0.7 to 1," in result.summary()
    assert content["n_tokens"] == result.batch.n_tokens == content["audit"]["tokens_used"]
    assert 'class="token given"' in (out / "report.html").read_text()


def test_each_generated_token_is_shown_with_its_share_and_given_ones_without(result):
    shares = np.split(token_attribution(result.base, estimator="exact"), result.batch.response_offsets[1:-1])
    for shown in largest(result.base, result.batch, result.slopes["exact"].contributions):
        i = shown["rollout"]
        tokens, generated = result.batch.row(i)
        texts = "".join(text for text, _ in [[shown["prompt"], None], *shown["tokens"]])
        assert texts.split() == [str(token) for token in tokens]
        found = [share for _, share in shown["tokens"] if share is not None]
        assert len(found) == sum(generated) and found == shares[i].tolist()
