from report_page import content, page


def test_every_number_of_slopes_and_curvature_is_on_the_page():
    run, found = content(), set(page().values("slope"))
    for entry in run["slope"]:
        names = ("value", "stderr", "jackknife_stderr", "pathwise", "score", "length_correction", "uncorrected")
        assert {entry[name] for name in names} | set(entry["interval"]) <= found
    names = ("value", "stderr", "score", "cross", "pathwise", "step")
    assert {run["curvature"][name] for name in names} <= found
    assert {run["trust"][name] for name in ("eta_star", "linear_until")} <= found
