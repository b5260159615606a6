import pytest
from runs import small_run


@pytest.fixture(scope="session")
def result():
    return small_run()


@pytest.fixture(scope="session")
def run(result, tmp_path_factory):
    """Its run folder."""
    return result.save(tmp_path_factory.mktemp("runs") / "deeper" / "run")
