from report_page import content, page


def test_every_number_of_a_change_is_on_the_page():
    run, found = content(), page()
    for entry in run["measured"]:
        names = ("eta", "delta", "stderr", "predicted_linear", "predicted_linear_stderr", "predicted_uncorrected")
        names += ("predicted_quadratic", "predicted_quadratic_stderr", "prediction_error", "prediction_error_stderr")
        assert {entry[name] for name in names} | set(entry["interval"]) <= set(found.values("changes"))
        names = ("ess", "ess_fraction", "ess_tokens", "max_weight", "mean_weight", "smoothed_delta")
        assert {entry[name] for name in names} | set(entry["khat"].values()) <= set(found.values("reliability"))
        assert entry["verdict_reason"] in found.text
    assert run["noise_floor"] in found.values("reliability")
    names = ("delta", "stderr", "difference", "difference_stderr")
    assert {run["fresh_check"][name] for name in names} <= set(found.values("changes"))
