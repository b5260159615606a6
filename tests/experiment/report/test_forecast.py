from report_page import content, page

from dentropy.experiment.trade import trade


def test_the_page_leads_with_what_the_step_buys():
    run = content()
    (said,) = [e["text"] for e in page(run).all("p", "trade")]
    assert said == trade(run)
    assert "buys reward +0.012 ± 0.003" in said


def test_every_change_is_in_a_table():
    run = content()
    text = page(run).text
    for name in ("What the step buys and costs", "Reward", "Length", "KL divergence", "pass at k: not asked for"):
        assert name in text


def test_a_run_of_before_has_neither():
    run = content()
    del run["forecast"]
    assert "buys" not in page(run).text
