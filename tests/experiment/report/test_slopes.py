from report_page import content, page


def test_every_number_of_slopes_and_curvature_is_on_the_page():
    run, found = content(), set(page().values("slope"))
    for entry in run["slope"]:
        names = ("value", "stderr", "jackknife_stderr", "pathwise", "other_answers", "score")
        names += ("length_correction", "uncorrected")
        assert {entry[name] for name in names} | set(entry["interval"]) <= found
        assert set(entry["part_stderrs"].values()) <= found
    names = ("value", "stderr", "score", "cross", "pathwise")
    for form, more in ((run["curvature"], "step"), (run["curvature"]["exact"], "difference")):
        assert {form[name] for name in (*names, more)} | set(form["part_stderrs"].values()) <= found
    assert {run["trust"][name] for name in ("eta_star", "linear_until")} <= found


def test_curvatures_that_part_are_named():
    run = content()
    run["curvature"]["exact"].update(difference=-5e4, difference_stderr=2e4)
    assert (
        "The causal and the exact curvature differ by 2.5 standard errors of their paired difference." in page(run).text
    )
    run["curvature"]["exact"].update(difference_stderr=3e4)
    assert "exact curvature differ" not in page(run).text


def test_a_curvature_that_is_not_told_apart_from_0_is_said_to_be():
    run = content()
    said = "It is not told apart from 0: η* may be far larger"
    assert said not in page(run).text
    run["curvature"]["interval"] = [-1.0, 8e4]
    assert said in page(run).text
