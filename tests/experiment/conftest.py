import pytest
from blank_figures import blank_figures
from runs import small_run


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Run folders get no real figures here; tests of figures and bars call what draws them."""
    blank_figures(monkeypatch)


@pytest.fixture(scope="session")
def result():
    return small_run()


@pytest.fixture(scope="session")
def run(result, tmp_path_factory):
    """Its run folder."""
    with pytest.MonkeyPatch.context() as patch:
        blank_figures(patch)
        return result.save(tmp_path_factory.mktemp("runs") / "deeper" / "run")
