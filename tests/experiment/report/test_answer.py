import pytest
from report_page import content, page

from dentropy.experiment.report.answer import answer, ways


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "This update lowers entropy by 0.0066 ± 0.0006 nats per token at step size 1e-4 (measured)."),
        (
            {"delta": 2.44e-7, "stderr": 1.3e-8, "interval": [2.1e-7, 2.7e-7]},
            "This update raises entropy by (2.44 ± 0.13)×10⁻⁷ nats per token at step size 1e-4 (measured).",
        ),
        (
            {"interval": [-0.014, 0.001]},
            "This update does not change entropy by an amount that can be told from zero at step size 1e-4: "
            "−0.0066 ± 0.0006 nats per token (measured).",
        ),
        (
            {"interval": None, "stderr": None, "stderr_reason": "there is one group"},
            "This update lowers entropy by 0.00661 nats per token at step size 1e-4 "
            "(measured, no error bar: there is one group).",
        ),
        (
            {"verdict": "unusable"},
            "This update lowers entropy by 0.0076 ± 0.0005 nats per token at step size 1e-4 "
            "(predicted; the measurement is unusable).",
        ),
        (
            {"below_noise_floor": True},
            "This update lowers entropy by 0.0076 ± 0.0005 nats per token at step size 1e-4 "
            "(predicted; the measurement is below the noise floor of the arithmetic).",
        ),
        (
            {"eta": 2e-4},
            "This update lowers entropy by 0.0076 ± 0.0005 nats per token at step size 1e-4 "
            "(predicted; not measured there).",
        ),
    ],
)
def test_the_answer_comes_first_in_one_sentence(changes, sentence):
    run = content()
    run["measured"][2].update(changes)
    assert answer(run) == sentence
    assert [e["text"] for e in page(run).all("h1")] == [sentence]


def test_without_an_interval_two_standard_errors_decide():
    run = content()
    run["measured"][2].update(interval=None, delta=-1.9e-3, stderr=1e-3)
    assert "told from zero" in answer(run)
    run["measured"][2].update(delta=-2.1e-3)
    assert "lowers entropy" in answer(run)


def test_shares_are_given_only_where_they_mean_something():
    run = content()
    causal = run["slope"][0]
    # −36 in the same contexts, −100 + 60 through other answers; −60 / 1.2 · 1e-4 is the change of length.
    assert ways(run) == (
        "Of the predicted change, 53% comes through other answers (0.5% ± 0.3% shorter on average) and 47% "
        "from next-token distributions that change in the same contexts."
    )
    causal["interval"] = [-160.0, 8.0]
    assert "%" not in ways(run).replace("(0.5% ± 0.3% shorter", "") and "opposite" not in ways(run)
    causal.update(interval=[-160.0, -8.0])
    assert "53%" in ways(run)
    causal["part_stderrs"]["other_answers"] = 21.0
    assert "−0.0040 ± 0.0021 through" in ways(run)
    causal["part_stderrs"]["other_answers"] = 4.4
    causal.update(pathwise=-116.0, length_correction=-60.0, score=100.0, other_answers=40.0)
    assert ways(run) == (
        "The predicted change is −0.01160 ± 0.00021 nats per token from next-token distributions that change in the "
        "same contexts, and +0.0040 ± 0.0004 through other answers (0.5% ± 0.3% longer on average). The two have "
        "opposite signs: neither is a share of the whole."
    )
    causal["other_answers"] = None
    assert ways(run) is None
