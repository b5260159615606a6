"""What makes trainers quick to test."""

import gc

import pytest

from dentropy.experiment.step_watch import OtherChange
from dentropy.integrations import transformers


@pytest.fixture(scope="package", autouse=True)
def little_garbage():
    """train() collects garbage again and again: of the tests alone, not among all that the libraries have loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def two_roundings(monkeypatch):
    """Most passes of a record are for its noise floor, which other tests hold."""
    monkeypatch.setattr("dentropy.passes.noise_floor.BLOCKS", 2)


class QuickStep:
    """In place of StepWatch, where a test is about what the recorder does with a step."""

    def __init__(self, watched, optimizer, batch, *, token_budget):
        self.batch = batch

    def look_back(self):
        pass

    def as_sampled(self):
        return self.batch

    def look_back_by(self, batch):
        return OtherChange(delta=0.1, stderr=0.01, ess_fraction=1.0, verdict="reliable")

    def numbers(self):
        return {"entropy": 2.0, "predicted_delta": 0.1, "measured_delta": 0.2}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(transformers, "StepWatch", QuickStep)
    return QuickStep
