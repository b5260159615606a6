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


def test_the_verdict_is_of_the_weights_and_zero_is_another_matter():
    run = content()
    run["measured"][1]["interval"] = [-0.01, 0.003]
    found = page(run)
    assert {"Weightsand what ΔH says", "Weightsverdict and why"} <= {e["text"] for e in found.all("th")}
    near = [e["text"] for e in found.all("div", class_="words", within="changes")]
    assert [text for text in near if "told apart" in text] == ["● reliable ΔH not told apart from 0"]


def test_the_measurement_with_sequence_weights_is_folded_away_with_all_its_numbers():
    run, found = content(), page()
    (folded,) = found.all("details", within="changes")
    shown = {float(e["attrs"]["value"]) for e in found.all("data") if folded in e["inside"]}
    for entry in (row["sequence"] for row in run["measured"]):
        names = ("delta", "stderr", "ess_fraction", "predicted_linear", "predicted_quadratic", "prediction_error")
        assert {entry[name] for name in (*names, "difference", "difference_stderr")} | set(entry["interval"]) <= shown
    for row in run["measured"]:
        del row["sequence"]
    assert not page(run).all("details", within="changes")


def test_forms_that_part_are_named():
    run = content()
    for row in run["measured"]:
        row["sequence"].update(difference=1.0, difference_stderr=0.51, verdict="reliable")
    assert "with sequence weights differ" not in page(run).text
    run["measured"][2]["sequence"].update(difference=-1.0, difference_stderr=0.25)
    said = (
        "with sequence weights differ, by more than 2 standard errors of their paired difference, at η = 0.0001 (4.0)."
    )
    assert said in page(run).text
    run["measured"][2]["sequence"]["verdict"] = "unusable"
    assert said not in page(run).text


def test_prediction_and_measurement_that_disagree_are_named():
    run = content()
    assert (
        "of their paired difference, at η = -0.0001 (2.4), 5e-05 (4.3), 0.0001 (4.7), 0.0004 (6.9)." in page(run).text
    )
    for entry in run["measured"]:
        entry["prediction_error"] = 1.9 * entry["prediction_error_stderr"]
    assert "paired difference" not in page(run).text
