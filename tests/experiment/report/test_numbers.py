import pytest

from dentropy.experiment.report import numbers


@pytest.mark.parametrize(
    ("value", "stderr", "digits", "text"),
    [
        (-6.6068, 0.56, 2, "−6.61"),
        (-6.6068, 0.56, 1, "−6.6"),
        (123.4, 20.0, 2, "123"),
        (0.5, 0.0996, 2, "0.50"),
        (2.0, None, 2, "2.00"),
        (-0.01234, None, 2, "−0.0123"),
        (0.0, None, 2, "0"),
        (0.0, 0.01, 2, "0.000"),
    ],
)
def test_digits_follow_the_error(value, stderr, digits, text):
    assert numbers.rounded(value, stderr, digits=digits) == text


@pytest.mark.parametrize(
    ("eta", "text"), [(1e-4, "1e-4"), (-2.5e-5, "−2.5e-5"), (0.01, "0.01"), (1e-6 * 3, "3e-6"), (0.0, "0"), (2.0, "2")]
)
def test_eta_is_written_as_it_is_typed(eta, text):
    assert numbers.step_text(eta) == text
